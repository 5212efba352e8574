//! Clients on the wires of `vmring serve`, beside a relay as anybody would write it, and beside the calls
//! alone.
//!
//! The clients have one processor, and the carrier has the other. The clients are the same for every
//! carrier.

mod carriers;
mod clients;
mod guests;
mod load;
mod relay;

use std::path::Path;

use crate::common::pinned;
use crate::net::{FULL_FRAME, SMALL_FRAME};
use crate::plan::{Part, Plan};
use crate::programs::{Measured, NO_VMRING, Programs, Step, run_tables};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::{Half, take_turns};
use crate::spread::Spread;

use carriers::{Carrier, Method};
use clients::Clients;
use load::{Load, Wire};

const STREAM: &str = "wires, stream";
const DATAGRAM: &str = "wires, datagram";
const LARGE: &str = "wires, 64 KiB";
const LATENCY: &str = "wires, latency";

/// One measurement lasts this many of the plan's times.
const TIMES: u32 = 4;
/// The longest frame of IPv4.
const LONG_FRAME: usize = 14 + 65_535;

pub(crate) fn run(plan: Plan, programs: Programs<'_>) -> Part {
    let vmring = programs.vmring.ok_or(NO_VMRING)?;
    let full = Load { wire: Wire::Stream, frame: FULL_FRAME, header: false, window: 1024 };
    let datagram = Load { wire: Wire::Datagram, window: 512, ..full };
    let large = Load { frame: LONG_FRAME, header: true, window: 32, ..full };
    let steps: [Step<'_>; 5] = [
        (STREAM, &|| {
            let about = "frames of 1514 bytes from one client to another, over a stream";
            let methods = [Method::Serve(vmring), Method::Relay, Method::Hops];
            flows(STREAM, about, plan, full, methods, |[ours, relay, hops]| {
                let what = |beside: &str| format!("{STREAM}: vmring serve / {beside}");
                vec![
                    Want::at_least(what("relay, packets/s"), ours.rate / relay.rate, 2.0),
                    Want::at_most(what("relay, CPU a packet"), ours.cpu / relay.cpu, 0.4),
                    Want::at_least(what("raw hops, packets/s"), ours.rate / hops.rate, 0.8),
                ]
            })
        }),
        (DATAGRAM, &|| {
            let about = "frames of 1514 bytes from one client to another, over datagrams";
            let methods = [Method::Serve(vmring), Method::Relay, Method::Hops];
            flows(DATAGRAM, about, plan, datagram, methods, |[ours, relay, _]| {
                let what = format!("{DATAGRAM}: vmring serve / relay, CPU a packet");
                vec![Want::at_most(what, ours.cpu / relay.cpu, 0.85)]
            })
        }),
        (LARGE, &|| {
            let about =
                "packets of 64 KiB with a virtio header from one client to another, over a stream";
            let methods = [Method::Serve(vmring), Method::Relay, Method::Hops];
            flows(LARGE, about, plan, large, methods, |[ours, relay, _]| {
                let what = format!("{LARGE}: vmring serve / relay, packets/s");
                vec![Want::at_least(what, ours.rate / relay.rate, 1.0)]
            })
        }),
        (LATENCY, &|| latency(plan, vmring)),
        (guests::NAME, &|| guests::run(plan, programs, vmring)),
    ];
    run_tables(&steps, programs.only)
}

/// The medians of a contender: packets per second, and nanoseconds of its processor time for each.
#[derive(Clone, Copy)]
struct Medians {
    rate: f64,
    cpu: f64,
}

/// Lets all contenders carry the same frames in turns. `wants` is given the medians of one place.
fn flows<const N: usize>(
    name: &'static str,
    about: &str,
    plan: Plan,
    load: Load,
    mut methods: [Method<'_>; N],
    wants: impl Fn([Medians; N]) -> Vec<Want>,
) -> Result<Measured> {
    let halves = take_turns(plan, &mut methods, |method| {
        let figures = pinned(|| flow(*method, load, plan));
        Ok(Some(figures.map_err(|error| format!("{}: {error}", method.name()))?))
    })?;
    let figures = &["packets/s", "Gbit/s", "CPU ns/packet"];
    let mut table = Table::new(name, about, &["carried by"], figures);
    let mut all = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let mut rows = half.values.iter();
        let medians = methods.map(|method| {
            let [rate, bits, cpu] = rows.next().expect("each contender has its values");
            let rate = table.row(&[method.name()], &[rate, bits, cpu]);
            Medians { rate, cpu: median(cpu) }
        });
        all.extend(half.wants(wants(medians)));
    }
    Ok(Ok((table, all)))
}

/// Packets per second, Gbit per second, and nanoseconds of the carrier's processor time for each packet.
fn flow(method: Method<'_>, load: Load, plan: Plan) -> Result<[f64; 3]> {
    let (carrier, sockets) = Carrier::start(method, load)?;
    let mut clients = Clients::new(sockets, load)?;
    clients.check()?;
    let mut times = Vec::new();
    let flow = clients.flow(plan.time * TIMES, || {
        times.push(carrier.processor_time()?);
        Ok(())
    })?;
    let [before, after] = times[..] else { return Err("the clock was looked at twice".into()) };
    let (packets, seconds) = (flow.packets as f64, flow.time.as_secs_f64());
    let rate = packets / seconds;
    let bits = rate * load.frame as f64 * 8.0 / 1e9;
    // The clients end before their carrier.
    drop(clients);
    Ok([rate, bits, (after - before).as_nanos() as f64 / packets])
}

/// One frame there and one back, between clients that sleep.
fn latency(plan: Plan, vmring: &Path) -> Result<Measured> {
    let load = Load { wire: Wire::Stream, frame: SMALL_FRAME, header: false, window: 1 };
    let mut methods = [Method::Serve(vmring), Method::Relay];
    let halves: Vec<Half<1>> = take_turns(plan, &mut methods, |method| {
        let trip = pinned(|| {
            let (carrier, sockets) = Carrier::start(*method, load)?;
            let mut clients = Clients::new(sockets, load)?;
            clients.check()?;
            let trips = clients.ping_pong(plan.time * TIMES)?;
            drop(clients);
            drop(carrier);
            Ok(median(&trips) / 1e3)
        });
        Ok(Some([trip.map_err(|error| format!("{}: {error}", method.name()))?]))
    })?;
    let about = "60 bytes there and 60 back between two clients that sleep, over a stream";
    let mut table = Table::new(LATENCY, about, &["carried by"], &["us for both"]);
    let mut wants = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let rows = methods.iter().zip(&half.values);
        let medians: Vec<f64> =
            rows.map(|(method, [values])| table.row(&[method.name()], &[values])).collect();
        let what = format!("{LATENCY}: vmring serve / relay");
        wants.extend(half.wants([Want::at_most(what, medians[0] / medians[1], 1.1)]));
    }
    Ok(Ok((table, wants)))
}

/// The median. It is not a number if there are no values.
fn median(values: &[f64]) -> f64 {
    if values.is_empty() { f64::NAN } else { Spread::of(values.iter().copied()).median }
}
