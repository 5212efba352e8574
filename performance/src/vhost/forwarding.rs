//! Frames between two guests of DPDK's virtio-user: how many, and what the back end is busy with each.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::backends::{Library, Nothing};
use super::ovs::{self, Ovs};
use super::testpmd::{Load, Testpmd, missing};
use crate::plan::Plan;
use crate::programs::Measured;
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::{Half, take_turns};
use crate::served::{Folder, Served};

pub(super) const FORWARDING: &str = "vhost, forwarding";
pub(super) const BUSY: &str = "vhost, busy";

/// How long the guests forward before they are measured.
const SETTLE: Duration = Duration::from_millis(300);
/// How often the frames are sent first.
const TRIES: u32 = 5;
/// One measurement lasts this many of the plan's times.
const TIMES: u32 = 10;
/// The bursts of 32 frames that each port sends first. They are the frames that go round.
const BURSTS: u32 = 8;

/// What the frames and the devices are like.
const SHAPES: [(u32, &str, &str); 3] =
    [(64, "mergeable", ""), (1514, "mergeable", ""), (64, "in order", ",mrg_rxbuf=0,in_order=1")];

/// The back ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method<'a> {
    /// The front end's own limit.
    Nothing,
    /// Two ports of `net_vhost`, forwarded by testpmd. It copies twice and has no switch.
    Testpmd,
    /// `vmring serve`, with a thread for each guest.
    Serve(&'a Path),
    /// The same library in this program, with one thread for both guests.
    Library,
    /// Open vSwitch with DPDK, whose ports connect to the front end.
    Ovs,
}

impl Method<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "does nothing",
            Self::Testpmd => "testpmd, net_vhost",
            Self::Serve(_) => "vmring serve --busy-poll",
            Self::Library => "vmring, one thread",
            Self::Ovs => "Open vSwitch, DPDK",
        }
    }
}

/// A back end that runs.
enum Running {
    Nothing { _backend: Nothing },
    Testpmd(Testpmd),
    Served { _backend: Served },
    Library(Library),
    Ovs(Ovs),
}

impl Running {
    fn start(method: Method<'_>, folder: &Folder, len: u32) -> Result<Self> {
        Ok(match method {
            Method::Nothing => Self::Nothing { _backend: Nothing::start(folder, len)? },
            Method::Testpmd => Self::Testpmd(Testpmd::back(folder)?),
            Method::Serve(program) => Self::Served { _backend: Served::start(program, folder)? },
            Method::Library => Self::Library(Library::start(folder)?),
            Method::Ovs => Self::Ovs(Ovs::start(folder)?),
        })
    }
}

/// One measurement: frames per second each way, and the busy nanoseconds of the back end for each
/// frame, if it counts them.
fn measure(method: Method<'_>, load: Load<'_>, time: Duration) -> Result<(f64, Option<f64>)> {
    let folder = Folder::new()?;
    let mut back = Running::start(method, &folder, load.len)?;
    let server = format!("{},server=1", load.device);
    let device = if method == Method::Ovs { &server } else { load.device };
    let mut front = Testpmd::front(&folder, Load { device, ..load })?;
    // A switch whose ports have just connected may lose the first frames, and then none goes round.
    for _ in 0..TRIES {
        front.does(&format!("start tx_first {BURSTS}\n"), "packets/burst")?;
        front.frames_per_second()?;
        thread::sleep(SETTLE);
        if front.frames_per_second()? > 0.0 {
            break;
        }
        front.does("stop\n", "Done.")?;
    }
    match &mut back {
        Running::Library(library) => library.restart_clock(),
        Running::Ovs(ovs) => ovs.restart_clock()?,
        _ => {}
    }
    front.frames_per_second()?;
    thread::sleep(time * TIMES);
    let rate = front.frames_per_second()?;
    if rate == 0.0 {
        return Err("no frame comes back".into());
    }
    let busy = match &mut back {
        Running::Testpmd(testpmd) => Some(testpmd.busy_ns()?),
        Running::Library(library) => Some(library.busy_ns()?),
        Running::Ovs(ovs) => Some(ovs.busy_ns()?),
        _ => None,
    };
    front.quit();
    Ok((rate, busy))
}

pub(super) fn run(plan: Plan, vmring: Option<&Path>) -> Result<Measured> {
    if let Some(why) = missing() {
        return Ok(Err(why));
    }
    let methods = [Method::Nothing, Method::Testpmd, Method::Library];
    let methods: Vec<_> = methods.into_iter().chain(vmring.map(Method::Serve)).collect();
    let mut all: Vec<_> = SHAPES
        .into_iter()
        .flat_map(|shape| methods.iter().map(move |method| (shape, *method)))
        .collect();
    let halves: Vec<Half<1>> = take_turns(plan, &mut all, |((len, _, device), method)| {
        let load = Load { len: *len, device, reads: 0 };
        let measured = measure(*method, load, plan.time);
        let (rate, _) = measured.map_err(|error| format!("{}: {error}", method.name()))?;
        Ok(Some([rate / 1e6]))
    })?;
    let mut table = Table::new(
        FORWARDING,
        "frames between two guests of DPDK's virtio-user, millions per second each way",
        &["bytes", "device", "back end"],
        &["M/s each way", "ns/frame"],
    );
    let (mut wants, mut rival) = (Vec::new(), f64::NAN);
    for half in &halves {
        half.begin(&mut table);
        for (((len, shape, _), method), [rates]) in all.iter().zip(&half.values) {
            // Two frames, one each way.
            let ns: Vec<f64> = rates.iter().map(|rate| 500.0 / rate).collect();
            let median = table.row(&[&len.to_string(), shape, method.name()], &[rates, &ns]);
            match method {
                Method::Nothing => {}
                Method::Testpmd => rival = median,
                _ => {
                    let name = format!("{len} B, {shape}: {}, frames / testpmd's", method.name());
                    wants.extend(half.wants([Want::at_least(name, median / rival, 1.0)]));
                }
            }
        }
    }
    Ok(Ok((table, wants)))
}

/// Reads of random memory with which testpmd's front end forwards some two million frames per second
/// each way on the machine of the figures.
const READS: u32 = 55;

pub(super) fn run_busy(plan: Plan) -> Result<Measured> {
    if let Some(why) = missing() {
        return Ok(Err(why));
    }
    // Why Open vSwitch has no row: it is not here, or it has failed.
    let mut absent = ovs::missing();
    let methods = [Method::Testpmd, Method::Ovs, Method::Library];
    let is_here = absent.is_none();
    let methods = methods.into_iter().filter(|method| *method != Method::Ovs || is_here);
    let mut all: Vec<_> = [64, 1514]
        .into_iter()
        .flat_map(|len| methods.clone().map(move |method| (len, method)))
        .collect();
    let halves: Vec<Half<2>> = take_turns(plan, &mut all, |(len, method)| {
        if *method == Method::Ovs && absent.is_some() {
            return Ok(None);
        }
        let load = Load { len: *len, device: "", reads: READS };
        let (rate, ns) = match measure(*method, load, plan.time) {
            Err(error) if *method == Method::Ovs => {
                absent = Some(error.to_string());
                return Ok(None);
            }
            measured => measured.map_err(|error| format!("{}: {error}", method.name()))?,
        };
        Ok(Some([ns.ok_or("the back end counts no time")?, rate / 1e6]))
    })?;
    let mut table = Table::new(
        BUSY,
        "the back end's time in polls that found something, while the front end is slowed down to some \
         two million frames per second each way",
        &["bytes", "back end"],
        &["busy ns/frame", "M/s each way"],
    );
    let (mut wants, mut testpmds, mut switchs) = (Vec::new(), f64::NAN, f64::NAN);
    for half in &halves {
        half.begin(&mut table);
        for ((len, method), [busy, rates]) in all.iter().zip(&half.values) {
            if *method == Method::Ovs && absent.is_some() {
                continue;
            }
            let median = table.row(&[&len.to_string(), method.name()], &[busy, rates]);
            match method {
                Method::Testpmd => testpmds = median,
                Method::Ovs => switchs = median,
                _ => {
                    let what = format!("{len} B, 2 M/s each way: busy time");
                    let dpdk =
                        Want::at_most(format!("{what} / testpmd's"), median / testpmds, 0.75);
                    let switch = switchs.is_finite().then(|| {
                        Want::at_most(format!("{what} / Open vSwitch's"), median / switchs, 0.5)
                    });
                    wants.extend(half.wants([dpdk].into_iter().chain(switch)));
                }
            }
        }
    }
    table.end();
    if let Some(why) = absent {
        table.row(&["", &format!("Open vSwitch, DPDK: {why}")], &[&[], &[]]);
    }
    Ok(Ok((table, wants)))
}
