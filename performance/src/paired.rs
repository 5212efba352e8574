//! Contenders that alternate in slices of some milliseconds, and what each costs above the first.
//!
//! A machine's speed drifts by more than a ring costs, and it drifts for seconds. Two slices that
//! follow each other have the same speed, so their difference does not contain the drift.

use std::time::{Duration, Instant};

use crate::common::pin;
use crate::net::{FULL_FRAME, QUEUE, SMALL_FRAME, Tap, in_new_namespace};
use crate::ours::Ours;
use crate::plan::{Part, Plan};
use crate::report::{Table, Want};
use crate::result::Result;

/// A contender. Its function does a slice of work, and returns the nanoseconds per packet.
pub(crate) struct Contender<'a> {
    pub(crate) name: &'static str,
    pub(crate) slice: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Contender<'a> {
    pub(crate) fn new(name: &'static str, slice: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self { name, slice: Box::new(slice) }
    }
}

/// About how long a slice takes.
pub(crate) const SLICE: Duration = Duration::from_micros(2500);

/// Nanoseconds of each of `packets` packets, which `work` moves.
pub(crate) fn time_each(packets: usize, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_nanos() as f64 / packets as f64)
}

/// Lets the contenders alternate for as long as the plan says. Returns the values of each, in order:
/// those with the same index were measured beside each other.
fn alternate(plan: Plan, contenders: &mut [Contender<'_>]) -> Result<Vec<Vec<f64>>> {
    let slices = plan.rounds * plan.time.as_micros().div_ceil(SLICE.as_micros()) as u32;
    let mut values = vec![Vec::new(); contenders.len()];
    for contender in &mut *contenders {
        // Warms up. What it costs is not measured.
        (contender.slice)()?;
    }
    for turn in 0..slices {
        for i in 0..contenders.len() {
            // Every second turn is backwards, so that nobody is always the later one.
            let i = if turn % 2 == 0 { i } else { contenders.len() - 1 - i };
            let Contender { name, slice } = &mut contenders[i];
            values[i].push(slice().map_err(|error| format!("{name}: {error}"))?);
        }
    }
    Ok(values)
}

/// A median and the ends of its interval of confidence, 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Median {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Median {
    /// The median of these values. Its interval is that of the sign test, which asks nothing of their
    /// distribution. Of fewer than six values it is the whole range.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len();
        assert!(count > 0, "there is a value");
        // The number of values below the true median is binomial. This is how many of the smallest and
        // of the greatest are outside of the interval.
        let outside = ((count as f64 - 1.96 * (count as f64).sqrt()) / 2.0 - 1.0).max(0.0) as usize;
        let median = f64::midpoint(values[(count - 1) / 2], values[count / 2]);
        Self { low: values[outside], median, high: values[count - 1 - outside] }
    }

    /// The median of what the one took more than the other, pair by pair.
    pub(crate) fn of_differences(values: &[f64], others: &[f64]) -> Self {
        Self::of(values.iter().zip(others).map(|(value, other)| value - other).collect())
    }
}

impl std::fmt::Display for Median {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1} to {:.1})", self.median, self.low, self.high)
    }
}

/// The labels and the figures of a table of pairs.
const LABELS: &[&str] = &["bytes", "contender"];
const FIGURES: &[&str] = &["ns above", "ns/packet", "pairs"];

/// The most nanoseconds per packet above the plain system call that are wanted, for rings, ownership
/// and counters together.
const ABOVE: f64 = 15.0;

/// The cheapest system call, as often as a slice has packets.
fn no_work() -> Result<f64> {
    const CALLS: usize = 4096;
    time_each(CALLS, || {
        for _ in 0..CALLS {
            // SAFETY: the call takes nothing. The C library does not keep its result.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        Ok(())
    })
}

/// What each contender costs above the first, a loop over the call `rival`, for packets of both lengths
/// over one TAP. `contenders` makes them for packets of so many bytes; the cheapest system call is added.
/// `way` says where the packets go.
pub(crate) fn above_call(
    plan: Plan,
    (name, about): (&'static str, &str),
    (way, rival): (&str, &str),
    contenders: impl for<'t> Fn(&'t Tap, usize) -> Result<Vec<Contender<'t>>> + Sync,
) -> Part {
    let about = format!(
        "{about}, in turns of 2.5 ms; above the first row, with the interval of confidence (95 %)"
    );
    let mut table = Table::new(name, about, LABELS, FIGURES);
    let mut wants = Vec::new();
    for bytes in [SMALL_FRAME, FULL_FRAME] {
        let above = in_new_namespace(|| {
            pin(0);
            let tap = Tap::open_up("tap0", QUEUE)?;
            let mut contenders = contenders(&tap, bytes)?;
            contenders.push(Contender::new("getppid(2)", no_work));
            let values = alternate(plan, &mut contenders)?;
            Ok(add_rows(&mut table, bytes, &contenders, &values))
        })?;
        let ours = [Ours::PLAIN_INLINE.name(), Ours::URING_INLINE.name()];
        for (name, above) in above.iter().filter(|(name, _)| ours.contains(name)) {
            let what = format!("{bytes} B {way}: {name}, ns above {rival}: {above}");
            wants.push(Want::at_most(what, above.median, ABOVE));
        }
    }
    Ok((vec![table], wants))
}

/// Adds the rows of contenders that moved packets of `bytes`. Returns what each costs above the
/// first.
fn add_rows(
    table: &mut Table,
    bytes: usize,
    contenders: &[Contender<'_>],
    values: &[Vec<f64>],
) -> Vec<(&'static str, Median)> {
    let mut all = Vec::new();
    for (i, (contender, own)) in contenders.iter().zip(values).enumerate() {
        let above = Median::of_differences(own, &values[0]);
        let spread = [above.low, above.median, above.high];
        let spread = if i == 0 { &[][..] } else { &spread };
        table.row(
            &[&bytes.to_string(), contender.name],
            &[spread, &[Median::of(own.clone()).median], &[own.len() as f64]],
        );
        all.push((contender.name, above));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // Tables of the sign test give the 40th and the 61st of 100 values, and the whole range of five.
        let values = |count: u32| (1..=count).map(f64::from).collect::<Vec<_>>();
        let of = |count| Median::of(values(count));
        assert_eq!(of(100), Median { low: 40.0, median: 50.5, high: 61.0 });
        assert_eq!(of(5), Median { low: 1.0, median: 3.0, high: 5.0 });
        assert_eq!(of(1), Median { low: 1.0, median: 1.0, high: 1.0 });
    }

    #[test]
    fn a_drift_is_not_in_the_differences() {
        let drift: Vec<f64> = (0..50).map(|i| f64::from(i * i)).collect();
        let dearer: Vec<f64> = drift.iter().map(|value| value + 7.0).collect();
        let above = Median::of_differences(&dearer, &drift);
        assert_eq!(above, Median { low: 7.0, median: 7.0, high: 7.0 });
    }

    #[test]
    fn the_contenders_alternate_in_both_orders() -> Result<()> {
        let order = std::cell::RefCell::new(Vec::new());
        let contender = |name: &'static str| {
            let order = &order;
            Contender::new(name, move || {
                order.borrow_mut().push(name);
                Ok(1.0)
            })
        };
        let mut both = [contender("a"), contender("b")];
        let plan = Plan { rounds: 2, time: SLICE, both: None };
        let values = alternate(plan, &mut both)?;
        assert_eq!(values, [[1.0, 1.0], [1.0, 1.0]]);
        assert_eq!(*order.borrow(), ["a", "b", "a", "b", "b", "a"]);
        Ok(())
    }
}
