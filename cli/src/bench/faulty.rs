//! Endpoints behind faults, for the tests of what measures.

use std::time::Duration;

use vmring::device::fault::Faults;
use vmring::{Embedded, Interface};

use super::endpoints::{Driving, Endpoints};
use super::limits::window;
use super::progress::Clock;
use super::setup::Setup;
use crate::device::DeviceName;
use crate::failure::Failure;
use crate::nat::NatArgs;
use crate::stop::Stop;

/// A short measurement.
pub(super) fn setup() -> Setup {
    Setup {
        device: DeviceName::Embedded,
        size: 60,
        offload: false,
        batch: 8,
        nat: NatArgs::default(),
        time: Duration::from_millis(200),
        both: None,
        cpu: None,
    }
}

/// Lets `body` measure for a fifth of a second between two ports of a network, each behind these faults.
pub(super) fn measure<T>(
    network: &str,
    driving: Driving,
    fault: impl Fn() -> Faults,
    body: impl FnOnce(&Setup, &mut Endpoints, &mut Clock<'_>) -> Result<T, Failure>,
) -> T {
    let setup = setup();
    let start = |_| {
        let driver = fault().wrap(Embedded::network(network).overflow(2048));
        Interface::builder().device(driver).start().unwrap()
    };
    let interfaces = (0..2).map(start).collect();
    let stop = Stop::new().unwrap();
    let mut clock = Clock::start(&stop, setup.time, None);
    let mut endpoints = Endpoints::over(interfaces, driving, window(setup.batch), &setup).unwrap();
    body(&setup, &mut endpoints, &mut clock).unwrap()
}
