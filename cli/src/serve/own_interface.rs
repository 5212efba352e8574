//! An interface of vmnet for each guest, as vmnet-helper has it, without a switch in front.

use vmring::device::Offloads;
use vmring::device::embedded::PortLimits;
use vmring::{Error, Interface, InterfaceBuilder, Mode, Vmnet};

use super::limits::STOP_TIMEOUT;
use super::spec::{ListenSpec, MacRule};
use super::teller::NetworkFacts;
use crate::bridge::spec::{End, NetworkArgs, Spec, start_with_most};
use crate::dhcp::DhcpArgs;
use crate::failure::Failure;
use crate::nat::NatArgs;
use crate::recording::Recording;

/// How the interfaces of guests are started. Each is started when its guest connects, and stopped when
/// the guest leaves.
#[derive(Clone, Debug)]
pub(super) struct OwnInterfaces {
    mode: Mode,
    mtu: Option<u32>,
    /// What one of them is granted.
    offloads: Offloads,
}

impl OwnInterfaces {
    /// Starts and stops an interface, and says what it was like. So an interface that cannot be had is no surprise of the first
    /// guest.
    pub(super) fn try_one(
        network: &Spec,
        wanted: Offloads,
        mtu: Option<u32>,
    ) -> Result<(Self, NetworkFacts), Failure> {
        let Spec::Vmnet(mode) = network else {
            return Err(Failure::Usage(format!(
                "{network} is one network for all guests, and --per-client is for vmnet; leave it out"
            )));
        };
        let (dhcp, nat) = (DhcpArgs::default(), NatArgs::default());
        let settings = NetworkArgs { dhcp: &dhcp, nat: &nat };
        let start = |offloads| network.start(offloads, mtu, settings);
        let End { interface, .. } = start_with_most(wanted, start)?;
        let offloads = interface.capabilities().offloads;
        let facts = NetworkFacts::of(&interface);
        interface.stop(STOP_TIMEOUT).map_err(Failure::starting)?;
        Ok((Self { mode: mode.clone(), mtu, offloads }, facts))
    }

    /// An interface for a guest.
    pub(super) fn start(
        &self,
        spec: &ListenSpec,
        id: [u8; 16],
        recorded: Option<(&Recording, String)>,
    ) -> Result<Interface, Error> {
        let offloads = self.offloads & spec.offloads();
        let builder = Interface::builder().mode(self.mode.clone()).interface_id(id);
        let builder = builder.isolated(spec.isolated).offloads(offloads);
        let set = |builder: InterfaceBuilder| match (self.mtu, spec.mac) {
            (Some(mtu), Some(MacRule::Fixed(mac))) => builder.mtu(mtu).mac(mac),
            (Some(mtu), _) => builder.mtu(mtu),
            (None, Some(MacRule::Fixed(mac))) => builder.mac(mac),
            (None, _) => builder,
        };
        match recorded {
            Some((recording, name)) => {
                set(builder).device(recording.capture.wrap(name, Vmnet::new())).start()
            }
            None => set(builder).device(Vmnet::new()).start(),
        }
    }

    /// Refuses a socket whose rules only the switch keeps.
    pub(super) fn check(&self, spec: &ListenSpec) -> Result<(), Failure> {
        let rule = match (spec.mac, &self.mode) {
            (Some(MacRule::Learn), _) => "mac=learn",
            (_, Mode::Bridged(_)) if spec.isolated => "isolated on a bridged network",
            _ if spec.limits != PortLimits::default() => "a limit",
            _ => return Ok(()),
        };
        Err(Failure::Usage(format!(
            "{spec}: {rule} is kept by the switch, which a guest with an interface of its own does not \
             have; leave it or --per-client out"
        )))
    }
}
