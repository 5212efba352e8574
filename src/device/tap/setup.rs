//! The host's end of a TAP: sets it up when an interface starts, and undoes that when it stops.

use std::net::Ipv4Addr;
use std::time::Duration;

use macaddr::MacAddr6;
use vmring_embedded::dhcp::DhcpConfig;
use vmring_embedded::{AddressRange as Range, NetworkMode};

use super::dhcp::Dhcp;
use super::forwarding::{self, Forwarding};
use super::link::{Link, Netlink, Refusal};
use super::nat::{Network, Rules};
use super::nft::Nft;
use super::switches::{self, End};
use crate::config::{InterfaceConfig, Ipv4Range, Mode};
use crate::error::{ConfigError, Error, TapError};

/// What an interface requests of the host's end.
pub(crate) struct Asked<'a> {
    pub(crate) name: &'a str,
    /// The TAP has just been created, and is deleted when its descriptors are closed.
    pub(crate) fresh: bool,
    /// Whether to set up what the mode says.
    pub(crate) configure: bool,
    pub(crate) config: &'a InterfaceConfig,
    pub(crate) host_mac: Option<MacAddr6>,
    pub(crate) dhcp: bool,
    pub(crate) lease_time: Duration,
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

    /// Makes the requested settings. Returns the MTU, and the DHCP server if there is one. If it
    /// fails, the settings that it has made are undone when `self` is dropped.
    pub(crate) fn apply(
        &mut self,
        asked: &Asked<'_>,
        host_mac: MacAddr6,
    ) -> Result<(u32, Option<Dhcp>), Error> {
        let config = asked.config;
        if let Some(mtu) = config.mtu
            && !(68..=65_521).contains(&mtu)
        {
            let sentence = format!("a TAP's MTU is 68 to 65,521 bytes, and not {mtu}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        let Some(link) = self.netlink.link(asked.name)?.filter(|link| link.mac == host_mac) else {
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
        let index = link.index;
        if asked.fresh {
            let end = match (asked.configure, &config.mode) {
                (false, _) => End::Bare,
                (true, Mode::Bridged(_)) => End::Port,
                (true, Mode::Host | Mode::Shared) => End::Routed,
            };
            // This is done before the link is up, so that no frame comes before.
            switches::set(asked.name, end)?;
        }
        if let Some(mac) = asked.host_mac.filter(|mac| *mac != link.mac) {
            self.netlink.set_mac(index, mac)?;
            self.undo.push(Undo::Mac { index, mac: link.mac });
        }
        let mtu = config.mtu.unwrap_or(link.mtu);
        if mtu != link.mtu {
            self.netlink.set_mtu(index, mtu)?;
            self.undo.push(Undo::Mtu { index, mtu: link.mtu });
        }
        let mut dhcp = None;
        if asked.configure {
            match &config.mode {
                Mode::Bridged(bridge) => self.enslave(&link, bridge)?,
                Mode::Host => dhcp = self.address(asked, &link, NetworkMode::Host, mtu)?,
                Mode::Shared => {
                    dhcp = self.address(asked, &link, NetworkMode::Shared, mtu)?;
                }
            }
        }
        if !link.up {
            self.netlink.set_up(index, true)?;
            self.undo.push(Undo::Down { index });
        }
        if let Some(nft) = &mut self.nft {
            nft.unlock();
        }
        if asked.fresh {
            // These settings disappear with the TAP.
            self.undo.clear();
        }
        Ok((mtu, dhcp))
    }

    /// Makes the TAP a port of `bridge`.
    fn enslave(&mut self, link: &Link, bridge: &str) -> Result<(), Error> {
        let master = self.netlink.link(bridge)?.filter(|link| link.is_bridge);
        let master = master.ok_or_else(|| TapError::NoBridge(bridge.to_owned()))?;
        if link.master != Some(master.index) {
            self.netlink.set_master(link.index, Some(master.index))?;
            self.undo.push(Undo::Master { index: link.index, master: link.master });
        }
        Ok(())
    }

    /// Sets up host or shared mode: the address, NAT and forwarding. Returns the DHCP server, if
    /// one was requested.
    fn address(
        &mut self,
        asked: &Asked<'_>,
        link: &Link,
        mode: NetworkMode,
        mtu: u32,
    ) -> Result<Option<Dhcp>, Error> {
        let range = match asked.config.ipv4 {
            Some(Ipv4Range { start: gateway, end, mask }) => Range { gateway, end, mask },
            None => Range::of(mode),
        };
        let locking = |refusal: Refusal| refusal.into_error("waiting for vmring's lock");
        let nft = self.nft.insert(Nft::open().map_err(locking)?);
        nft.lock().map_err(locking)?;
        range.check().map_err(|error| ConfigError::Invalid(error.to_string()))?;
        let Range { gateway, end, mask } = range;
        self.range = Some(Ipv4Range { start: gateway, end, mask });
        let prefix = u32::from(mask).count_ones() as u8;
        let network = Ipv4Addr::from(u32::from(gateway) & u32::from(mask));
        if self.netlink.add_address(link.index, gateway, prefix)? {
            self.undo.push(Undo::Address { index: link.index, address: gateway, prefix });
        }
        let shared = mode == NetworkMode::Shared;
        self.rules = Some(Rules::start(Network {
            tap: asked.name,
            address: network,
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
            first: Ipv4Addr::from(u32::from(gateway) + 1),
            last: end,
            mask,
            router: shared.then_some(gateway),
            dns: asked.dns.to_vec(),
            mtu: u16::try_from(mtu).ok(),
            lease_time: asked.lease_time,
        };
        Dhcp::new(config, link.index).map(Some)
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
            keep(match step {
                Undo::Down { index } => self.netlink.set_up(index, false),
                Undo::Mtu { index, mtu } => self.netlink.set_mtu(index, mtu),
                Undo::Mac { index, mac } => self.netlink.set_mac(index, mac),
                Undo::Address { index, address, prefix } => {
                    self.netlink.remove_address(index, address, prefix).map(drop)
                }
                Undo::Master { index, master } => self.netlink.set_master(index, master),
            });
        }
        if let Some(mut nft) = self.nft.take() {
            nft.unlock();
        }
        result
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::debug!(%error, "the TAP's earlier settings were not all restored");
        }
    }
}
