//! The demo on the TAP device.

use vmring::{MacAddr6, Mode, Tap};

use crate::args::{DemoArgs, TapArgs};
use crate::failure::Failure;

/// The MAC of the kernel's end in the demo, a locally administered address.
pub(crate) const HOST_MAC: MacAddr6 = MacAddr6::new(0x02, 0x6b, 0x65, 0x72, 0x6e, 0x01);

impl TapArgs {
    /// Refuses options that other devices do not have.
    pub(crate) fn check_absent(self) -> Result<(), Failure> {
        match self.engine {
            None => Ok(()),
            Some(_) => {
                Err(Failure::Usage("--engine is for the tap device; add --device tap".to_owned()))
            }
        }
    }

    pub(crate) fn driver(self) -> Tap {
        Tap::new().engine(self.engine.unwrap_or_default()).host_mac(HOST_MAC)
    }
}

/// Refuses what the demo cannot do on a TAP.
pub(crate) fn check(args: &DemoArgs) -> Result<(), Failure> {
    if let Mode::Bridged(_) = args.mode {
        return Err(Failure::Usage(
            "the demo puts the tap device into a network namespace of its own, which has no \
             bridge; use --mode host or shared"
                .to_owned(),
        ));
    }
    // The kernel accepts less, but the demo has the same bounds on every device.
    if let Some(mtu) = args.mtu.filter(|mtu| !(1280..=65_521).contains(mtu)) {
        return Err(Failure::Usage(format!(
            "an MTU of {mtu} is not possible; it must be from 1280 to 65521"
        )));
    }
    Ok(())
}
