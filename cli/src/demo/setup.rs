//! The demo's network: two interfaces with a ring each, or one interface whose other end is the
//! kernel.

use std::sync::atomic::{AtomicU32, Ordering};

use vmring::device::Offloads;
use vmring::device::embedded::nat::{HostPort, NatSettings, Protocol};
use vmring::device::pcap::Capture;
use vmring::{
    Direction, Drive, Driver, Error, Interface, InterfaceBuilder, Ipv4Range, Mode, Poller, Ring,
    RingControl,
};

use super::host::HostServer;
use super::limits::{CLOSE_TIMEOUT, LARGE_PACKET, depth};
use super::nic::NetworkCard;
#[cfg(target_os = "linux")]
use super::tap;
#[cfg(target_os = "linux")]
use crate::args::TapArgs;
use crate::args::{DemoArgs, DriveArg};
use crate::device::{self, DeviceName};
use crate::dhcp::DhcpArgs;
use crate::failure::Failure;

/// What the network is to be like.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    mode: Mode,
    mtu: Option<u32>,
    subnet: Option<Ipv4Range>,
    drive: DriveArg,
    device: DeviceName,
    offload: bool,
    #[cfg(target_os = "linux")]
    tap: TapArgs,
    dhcp: DhcpArgs,
    /// What a guest fetches from, if the network has a way out.
    host: Option<HostServer>,
}

impl Settings {
    /// Whether the kernel's stack is the other guest.
    pub(crate) fn has_kernel(&self) -> bool {
        self.device.is_tap()
    }

    /// A driver for one end of the network with this name.
    fn driver(&self, network: &str) -> Result<Box<dyn Driver>, Error> {
        #[cfg(target_os = "linux")]
        if self.has_kernel() {
            return Ok(Box::new(self.dhcp.tap(self.tap.driver())));
        }
        match &self.host {
            Some(host) => {
                let settings = NatSettings::new()
                    .host_port(HostPort { port: host.port(), protocol: Protocol::Tcp });
                Ok(Box::new(device::embedded(network, &self.dhcp).nat(settings)))
            }
            None => self.device.driver(network, &self.dhcp),
        }
    }

    /// The server on the host's side, if guests reach it.
    pub(crate) fn host(&self) -> Option<HostServer> {
        self.host.clone()
    }

    /// The offloads that the device is asked for.
    fn offloads(&self) -> Offloads {
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.tso4) = (self.offload, self.offload);
        offloads
    }

    /// Whether the guests send packets that are longer than the MTU.
    fn sends_large(&self) -> bool {
        self.offload && !self.has_kernel()
    }

    /// Checks the arguments. Refuses devices and subnets that cannot carry two guests.
    pub(crate) fn of(args: &DemoArgs) -> Result<Self, Failure> {
        let device = args.device;
        if device == DeviceName::Loopback {
            return Err(Failure::Usage(
                "the loopback device has one interface and the demo needs two that see each other; \
                 use --device embedded"
                    .to_owned(),
            ));
        }
        if args.offload && !(device == DeviceName::Embedded || device.is_tap()) {
            return Err(Failure::Usage(
                "--offload is for the embedded and the tap device".to_owned(),
            ));
        }
        #[cfg(target_os = "linux")]
        match device {
            DeviceName::Tap => tap::check(args)?,
            _ => args.tap.check_absent()?,
        }
        args.dhcp.check(usize::from(device.has_dhcp()))?;
        let DemoArgs { mode, mtu, subnet, drive, .. } = args;
        let has_way_out = device == DeviceName::Embedded && *mode == Mode::Shared;
        let host = has_way_out.then(HostServer::listen).transpose();
        let host = host.map_err(|error| {
            Failure::Step(format!("the server on the host's side cannot start: {error}"))
        })?;
        let settings = Self {
            mode: mode.clone(),
            mtu: *mtu,
            subnet: *subnet,
            drive: *drive,
            device,
            offload: args.offload,
            #[cfg(target_os = "linux")]
            tap: args.tap,
            dhcp: args.dhcp.clone(),
            host,
        };
        if let Some(range) = subnet
            && !settings.has_kernel()
        {
            room_for_two(range)?;
        }
        Ok(settings)
    }
}

/// Refuses a range that has fewer than two addresses after the gateway's.
fn room_for_two(range: &Ipv4Range) -> Result<(), Failure> {
    let guests = u32::from(range.end).saturating_sub(u32::from(range.start));
    if guests >= 2 {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "the demo has two guests and the subnet has {} after the gateway {}; use /29 or wider with \
         the first address as the gateway, like 192.168.70.1/24",
        if guests == 1 { "one address" } else { "no address" },
        range.start
    )))
}

/// One guest's side of the network.
#[derive(Debug)]
pub(crate) struct GuestSide {
    pub(crate) interface: Interface,
    pub(crate) control: RingControl,
    ring: Ring,
    depth: usize,
    sends_large: bool,
}

impl GuestSide {
    /// Makes the guest's network card. The interface and the ring's control handle stay with the
    /// caller.
    pub(crate) fn into_nic(self) -> (Interface, RingControl, NetworkCard) {
        let nic = NetworkCard::new(self.ring, self.depth, self.depth, self.sends_large);
        (self.interface, self.control, nic)
    }
}

/// A new network for each call: the sides of two guests, or of one whose other end is the kernel;
/// and the poller, if they share one.
#[derive(Debug)]
pub(crate) struct DemoNetwork {
    pub(crate) sides: Vec<GuestSide>,
    pub(crate) poller: Option<Poller>,
}

impl DemoNetwork {
    pub(crate) fn start(settings: &Settings, capture: Option<&Capture>) -> Result<Self, Error> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let network = format!("demo {}", RUNS.fetch_add(1, Ordering::Relaxed));
        let poller = match settings.drive {
            DriveArg::Shared => Some(Poller::builder().name("poller").start()?),
            _ => None,
        };
        let start = |number: usize| {
            let driver = settings.driver(&network)?;
            let mut builder =
                Interface::builder().mode(settings.mode.clone()).offloads(settings.offloads());
            if let Some(mtu) = settings.mtu {
                builder = builder.mtu(mtu);
            }
            if let Some(range) = settings.subnet {
                builder = builder.ipv4(range);
            }
            let name = format!("guest{number}");
            let builder: InterfaceBuilder = match capture {
                Some(capture) => builder.device(capture.wrap(&name, driver)),
                None => builder.device(driver),
            };
            let interface = builder.start()?;
            let longest = if settings.sends_large() { LARGE_PACKET } else { interface.mtu() };
            let depth = depth(longest);
            let drive = match (settings.drive, &poller) {
                (DriveArg::Inline, _) => Drive::Inline,
                (_, Some(poller)) => Drive::Shared(poller),
                _ => Drive::Thread,
            };
            let builder = interface.ring(Direction::Both).depth(depth).drive(drive);
            let builder = match drive {
                Drive::Thread => builder.thread_name(format!("poller{number}")),
                _ => builder,
            };
            let ring = builder.close_timeout(CLOSE_TIMEOUT).build()?;
            let control = ring.control();
            let (depth, sends_large) = (depth as usize, settings.sends_large());
            Ok::<_, Error>(GuestSide { interface, control, ring, depth, sends_large })
        };
        let sides = if settings.has_kernel() { 1 } else { 2 };
        Ok(Self { sides: (0..sides).map(start).collect::<Result<_, _>>()?, poller })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_needs_an_address_for_each_guest() {
        for (subnet, fits) in [
            ("10.0.0.1/29", true),
            ("10.0.0.1/24", true),
            ("192.168.64.252/24", true),
            ("192.168.64.253/24", false),
            ("192.168.64.254/24", false),
            ("192.168.64.255/24", false),
            ("10.0.0.1/30", false),
            ("10.0.0.1/31", false),
            ("10.0.0.1/32", false),
        ] {
            let checked = room_for_two(&subnet.parse().unwrap());
            assert_eq!(checked.is_ok(), fits, "{subnet}");
        }
    }
}
