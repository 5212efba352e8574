//! An interface of vmnet for each guest, as vmnet-helper has it, without a switch in front.

use vmring::device::Offloads;
use vmring::device::embedded::PortLimits;
use vmring::device::vmnet::VmnetNetwork;
use vmring::{Error, Interface, Mode};

use super::limits::STOP_TIMEOUT;
use super::spec::{ListenSpec, MacRule};
use super::teller::NetworkFacts;
use crate::bridge::spec::{End, Spec, start_with_most};
use crate::failure::Failure;
use crate::recording::Recording;
use crate::vmnet::VmnetSpec;

/// How the interfaces of guests are started. Each is started when its guest connects, and stopped when
/// the guest leaves.
#[derive(Clone, Debug)]
pub(super) struct OwnInterfaces {
    vmnet: VmnetSpec,
    /// The network object that all interfaces are on, if there is one.
    object: Option<VmnetNetwork>,
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
        let Spec::Vmnet(vmnet) = network else {
            return Err(Failure::Usage(format!(
                "{network} is one network for all guests, and --per-client is for vmnet; leave it out"
            )));
        };
        let failed = |error| match Failure::starting(error) {
            Failure::Usage(sentence) => Failure::Usage(format!("{network}: {sentence}")),
            Failure::Step(sentence) => Failure::Step(format!("{network}: {sentence}")),
        };
        let object = vmnet.create(mtu).map_err(failed)?;
        let start = |offloads| {
            let builder = Interface::builder().offloads(offloads);
            let (builder, driver) = vmnet.place(object.as_ref(), mtu, builder);
            let interface = builder.device(driver).start().map_err(failed)?;
            Ok(End::of(&network.to_string(), interface))
        };
        let End { interface, .. } = start_with_most(wanted, start)?;
        let offloads = interface.capabilities().offloads;
        let facts = NetworkFacts::of(&interface);
        interface.stop(STOP_TIMEOUT).map_err(Failure::starting)?;
        Ok((Self { vmnet: vmnet.clone(), object, mtu, offloads }, facts))
    }

    /// An interface for a guest.
    pub(super) fn start(
        &self,
        spec: &ListenSpec,
        id: [u8; 16],
        recorded: Option<(&Recording, String)>,
    ) -> Result<Interface, Error> {
        let offloads = self.offloads & spec.offloads();
        let builder = Interface::builder().interface_id(id);
        let builder = builder.isolated(spec.isolated).offloads(offloads);
        let builder = match spec.mac {
            Some(MacRule::Fixed(mac)) => builder.mac(mac),
            _ => builder,
        };
        let (builder, driver) = self.vmnet.place(self.object.as_ref(), self.mtu, builder);
        match recorded {
            Some((recording, name)) => builder.device(recording.capture.wrap(name, driver)).start(),
            None => builder.device(driver).start(),
        }
    }

    /// Refuses a socket whose rules only the switch keeps.
    pub(super) fn check(&self, spec: &ListenSpec) -> Result<(), Failure> {
        let rule = match (spec.mac, &self.vmnet.mode) {
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
