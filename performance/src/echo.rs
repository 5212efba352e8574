//! What an entry costs on its way to another thread and back: a submission with its completion,
//! beside the bare queue of a well-maintained crate, a channel, and the kernel's own ring.
//!
//! Each contender is checked before it is timed: whole laps of its queues, entry by entry.

mod limits;
mod ours;
mod rivals;

use std::time::Duration;

use crate::common::pinned;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::take_turns;

const BATCHES: [usize; 4] = [1, 8, 32, 128];
#[derive(Clone, Copy, PartialEq)]
enum Method {
    Rtrb,
    RtrbChunks,
    Channel,
    Nop,
    Ours(ours::Kind),
}

impl Method {
    const ALL: [Self; 8] = [
        Self::Rtrb,
        Self::RtrbChunks,
        Self::Channel,
        Self::Nop,
        Self::Ours(ours::Kind { loopback: false, batches: false }),
        Self::Ours(ours::Kind { loopback: false, batches: true }),
        Self::Ours(ours::Kind { loopback: true, batches: false }),
        Self::Ours(ours::Kind { loopback: true, batches: true }),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Rtrb => "rtrb, one by one",
            Self::RtrbChunks => "rtrb, in chunks",
            Self::Channel => "crossbeam-channel",
            Self::Nop => "io_uring NOP",
            Self::Ours(kind) => kind.name(),
        }
    }

    fn measure(self, batch: usize, time: Duration) -> Result<f64> {
        match self {
            Self::Rtrb => rivals::rtrb(batch, time, false),
            Self::RtrbChunks => rivals::rtrb(batch, time, true),
            Self::Channel => rivals::channel(batch, time),
            Self::Nop => rivals::nop(batch, time),
            Self::Ours(kind) => ours::measure(kind, batch, time),
        }
    }
}

pub(crate) fn run(plan: Plan) -> Part {
    let mut contenders: Vec<(usize, Method)> =
        BATCHES.iter().flat_map(|batch| Method::ALL.map(|method| (*batch, method))).collect();
    let halves = pinned(|| {
        take_turns(plan, &mut contenders, |(batch, method)| {
            let ns = method
                .measure(*batch, plan.time)
                .map_err(|e| format!("echo, {}, batch {batch}: {e}", method.name()))?;
            Ok(Some([ns]))
        })
    })?;
    let mut table = Table::new(
        "echo",
        "an entry to another thread and back, so many on their way; a packet over the loopback is two",
        &["batch", "contender"],
        &["ns/entry"],
    );
    let mut all = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let mut medians = Vec::new();
        for ((batch, method), [values]) in contenders.iter().zip(&half.values) {
            let median = table.row(&[&batch.to_string(), method.name()], &[values]);
            medians.push((*batch, *method, median));
        }
        all.extend(half.wants(wants(&medians)));
    }
    Ok((vec![table], all))
}

fn wants(medians: &[(usize, Method, f64)]) -> Vec<Want> {
    let of = |wanted: Method| {
        let found = medians.iter().find(|(batch, method, _)| *batch == 32 && *method == wanted);
        found.map_or(f64::NAN, |row| row.2)
    };
    // The goal is the faster of rtrb's two methods, at this batch.
    let bare = of(Method::Rtrb).min(of(Method::RtrbChunks));
    let mut wants = Vec::new();
    for ours in Method::ALL.into_iter().filter(|method| matches!(method, Method::Ours(_))) {
        let name = ours.name();
        wants.push(Want::at_least(format!("echo, 32: rtrb / {name}"), bare / of(ours), 0.8));
        let what = format!("echo, 32: io_uring NOP / {name}");
        wants.push(Want::at_least(what, of(Method::Nop) / of(ours), 8.0));
    }
    wants
}
