//! The devices of one case, and what is wrapped around them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmring::device::fault::Faults;
use vmring::device::pcap::Capture;
use vmring::{Driver, Loopback, Status};

use crate::churn::nasty::{Inside, Nasty, Script};
use crate::churn::{PATIENCE, SHORT_CLOSE};
use crate::support::{Dice, quiet_network};

/// A driver, and the identity of its interface.
pub(crate) type Identified = ([u8; 16], Box<dyn Driver>);

/// An identity: no two of the process are the same.
pub(crate) fn new_interface_id() -> [u8; 16] {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = *b"churn___________";
    id[8..].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    id
}

#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) device: Under,
    pub(crate) faults: Option<FaultPlan>,
    pub(crate) capture: bool,
    /// Whether the processor time of a second without work is measured.
    pub(crate) measured: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Under {
    Loopback,
    /// Two interfaces on one network.
    Embedded,
    Nasty(Script),
    /// A device that the caller brings.
    #[allow(dead_code)] // the soak has these
    Other,
}

/// What `vmring::device::fault` does. Numbers are percent unless they say otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultPlan {
    short: u8,
    exhaustion: u8,
    errors: u8,
    abandon: u8,
    twice: u8,
    late: u8,
    /// Microseconds; 0 is no completion engine.
    hold_us: u64,
    reorder: bool,
    fails_after: Option<u64>,
    panics_after: Option<u64>,
    stuck: bool,
}

impl FaultPlan {
    /// Faults of which a ring recovers.
    pub(crate) fn draw_mild(dice: &mut Dice) -> Self {
        let mut rare = || if dice.below(3) == 0 { 1 + dice.below(60) as u8 } else { 0 };
        let (short, exhaustion, errors, abandon) = (rare(), rare(), rare(), rare());
        let (twice, late) = (rare(), rare());
        let hold_us = if dice.below(3) == 0 { 1 + dice.below(300) } else { 0 };
        let reorder = dice.below(2) == 0;
        Self {
            short,
            exhaustion,
            errors,
            abandon,
            twice,
            late,
            hold_us,
            reorder,
            ..Self::default()
        }
    }

    fn draw(dice: &mut Dice) -> Self {
        let mut plan = Self::draw_mild(dice);
        match dice.below(8) {
            0 => plan.fails_after = Some(dice.below(40)),
            1 => plan.panics_after = Some(dice.below(40)),
            2 => plan.stuck = true,
            _ => {}
        }
        plan
    }

    fn faults(&self, seed: u64) -> Faults {
        let p = |percent: u8| f64::from(percent) / 100.0;
        let mut faults = Faults::seeded(seed)
            .short_batches(p(self.short))
            .exhaustion(p(self.exhaustion))
            .errors(p(self.errors), Status::NotAuthorized)
            .abandon(p(self.abandon))
            .duplicate_wakes(p(self.twice))
            .late_wakes(p(self.late), Duration::from_micros(300));
        if self.hold_us > 0 {
            faults = faults.engine(Duration::from_micros(self.hold_us), self.reorder);
        }
        if let Some(n) = self.fails_after {
            faults = faults.fail_after(n, Status::SharingServiceBusy);
        }
        if let Some(n) = self.panics_after {
            faults = faults.panic_after(n);
        }
        if self.stuck { faults.stuck_at_close() } else { faults }
    }
}

impl Setup {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let device = match dice.below(4) {
            0 => Under::Loopback,
            1 => Under::Embedded,
            _ => Under::Nasty(Script::draw(dice)),
        };
        Self {
            seed: dice.below(u64::MAX),
            device,
            faults: (dice.below(3) == 0).then(|| FaultPlan::draw(dice)),
            capture: dice.below(6) == 0,
            measured: dice.below(200) == 0,
        }
    }

    /// Whether a slot may be lost for good.
    pub(crate) fn loses(&self) -> bool {
        let nasty = matches!(&self.device, Under::Nasty(script) if script.loses());
        nasty || self.faults.as_ref().is_some_and(|faults| faults.stuck)
    }

    /// Whether rings work until somebody closes them.
    pub(crate) fn lives(&self) -> bool {
        let nasty = match &self.device {
            Under::Nasty(script) => script.panics.is_none() && script.fails_restart == 0,
            _ => true,
        };
        let faults = self.faults.as_ref();
        nasty && faults.is_none_or(|plan| plan.fails_after.is_none() && plan.panics_after.is_none())
    }

    /// Whether everything has come back when a close is over.
    pub(crate) fn is_honest(&self) -> bool {
        let nasty = matches!(&self.device, Under::Nasty(script) if !script.is_honest());
        let faults = self.faults.as_ref().is_some_and(|plan| plan.panics_after.is_some());
        !nasty && !faults && !self.loses()
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        if self.loses() { SHORT_CLOSE } else { PATIENCE }
    }

    fn interfaces(&self) -> usize {
        match self.device {
            Under::Embedded => 2,
            _ => 1,
        }
    }

    /// The drivers of a world's interfaces. `prefix` is of this world only.
    pub(crate) fn drivers(&self, prefix: &str, inside: &Arc<Inside>) -> Vec<Identified> {
        let network = format!("liveness-{prefix}");
        let driver = |i| (new_interface_id(), self.driver(i, &network, prefix, inside));
        (0..self.interfaces()).map(driver).collect()
    }

    fn driver(
        &self,
        i: usize,
        network: &str,
        prefix: &str,
        inside: &Arc<Inside>,
    ) -> Box<dyn Driver> {
        match &self.device {
            Under::Loopback => self.wrap(i, Box::new(Loopback::new(200))),
            Under::Embedded => self.wrap(i, Box::new(quiet_network(network))),
            Under::Nasty(script) => {
                let (script, inside) = (script.clone(), inside.clone());
                self.wrap(i, Box::new(Nasty { script, inside, prefix: prefix.to_owned() }))
            }
            Under::Other => unreachable!("the caller brings the driver"),
        }
    }

    /// The wrappers around `inner`.
    pub(crate) fn wrap(&self, i: usize, inner: Box<dyn Driver>) -> Box<dyn Driver> {
        let mut driver = inner;
        if let Some(faults) = &self.faults {
            driver = Box::new(faults.faults(self.seed.wrapping_add(i as u64)).wrap(driver));
        }
        if self.capture {
            let capture = Capture::to_writer(std::io::sink()).expect("a capture to nowhere");
            driver = Box::new(capture.wrap(format!("interface{i}"), driver));
        }
        driver
    }
}
