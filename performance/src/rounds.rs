//! Turns of contenders whose threads are on two processors.
//!
//! A figure of two threads depends on where the processors are, which the host of a virtual machine may
//! change at any time. So each turn belongs to the place where they were before and after it, and a turn
//! during which they moved is repeated. What a part gets is a [`Half`] for each place that was seen.

use std::thread;
use std::time::{Duration, Instant};

use crate::cache_line;
use crate::common::is_real_time;
use crate::place::{Distance, Place};
use crate::plan::Plan;
use crate::report::{Table, Want};
use crate::result::Result;

/// How often a turn is tried that others disturb, or during which the processors move.
const ATTEMPTS: u32 = 10;
/// How long to wait for the other place until the next look.
const PAUSE: Duration = Duration::from_millis(100);

/// What was measured in one place of the processors.
pub(crate) struct Half<const N: usize> {
    distance: Distance,
    /// The round trips of a cache line at all looks.
    trips: Vec<f64>,
    /// The values of each contender, a list for each figure.
    pub(crate) values: Vec<[Vec<f64>; N]>,
}

impl<const N: usize> Half<N> {
    fn new(distance: Distance, contenders: usize) -> Self {
        let values = (0..contenders).map(|_| [const { Vec::new() }; N]).collect();
        Self { distance, trips: Vec::new(), values }
    }

    /// How often each contender had its turn here.
    fn rounds(&self) -> impl Iterator<Item = usize> {
        self.values.iter().map(|values| values[0].len())
    }

    pub(crate) fn distance(&self) -> Distance {
        self.distance
    }

    /// The next rows of the table are of this half.
    pub(crate) fn begin(&self, table: &mut Table) {
        let (least, most) = (self.rounds().min().unwrap_or(0), self.rounds().max().unwrap_or(0));
        table.begin(Place::of(self.trips.clone()), [least, most]);
    }

    /// The wants, of this half.
    pub(crate) fn wants(
        &self,
        wants: impl IntoIterator<Item = Want>,
    ) -> impl Iterator<Item = Want> {
        wants.into_iter().map(|want| want.in_place(self.distance))
    }
}

/// Lets all contenders take turns, as often as the plan says. If the plan wants both places, goes on until
/// each contender has had as many turns in either, or until the plan's limit has passed; in a place where
/// nothing is missing it only waits for the other one.
///
/// `measure` gives the figures of a turn. It gives none if others have disturbed it; then it is tried
/// again, as if the processors had moved. A turn that fails each time has no figures.
pub(crate) fn take_turns<C, const N: usize>(
    plan: Plan,
    contenders: &mut [C],
    measure: impl FnMut(&mut C) -> Result<Option<[f64; N]>>,
) -> Result<Vec<Half<N>>> {
    // At a real-time priority, others have the processors for as long as they could not have them.
    let rest = if is_real_time() { thread::sleep } else { |_| {} };
    let mut turns = Turns { look: || cache_line::place(1), rest, measure };
    turns.take(plan, contenders)
}

/// What happens in turns.
struct Turns<L, R, M> {
    look: L,
    /// Called after each attempt, with the time that it took.
    rest: R,
    measure: M,
}

impl<L, R, M> Turns<L, R, M>
where
    L: FnMut() -> Result<Place>,
    R: FnMut(Duration),
{
    fn take<C, const N: usize>(&mut self, plan: Plan, contenders: &mut [C]) -> Result<Vec<Half<N>>>
    where
        M: FnMut(&mut C) -> Result<Option<[f64; N]>>,
    {
        let places = [Distance::One, Distance::Near, Distance::Far];
        let mut halves = places.map(|place| Half::new(place, contenders.len()));
        let rounds = plan.rounds as usize;
        let start = Instant::now();
        for pass in 1.. {
            let mut idle = true;
            for (number, contender) in contenders.iter_mut().enumerate() {
                for _ in 0..ATTEMPTS {
                    let begin = Instant::now();
                    let before = (self.look)()?;
                    let half = &mut halves[before.distance as usize];
                    if plan.both.is_some() && half.values[number][0].len() >= rounds {
                        break;
                    }
                    idle = false;
                    let figures = (self.measure)(contender)?;
                    let after = (self.look)()?;
                    (self.rest)(begin.elapsed());
                    if after.distance == before.distance
                        && let Some(figures) = figures
                    {
                        if before.distance != Distance::One {
                            half.trips.extend([before.round_trip_ns, after.round_trip_ns]);
                        }
                        let lists = half.values[number].iter_mut();
                        lists.zip(figures).for_each(|(list, figure)| list.push(figure));
                        break;
                    }
                }
            }
            let [one, near, far] = &halves;
            let full = |half: &Half<N>| half.rounds().all(|count| count >= rounds);
            let missing = plan.both.is_some() && !full(one) && !(full(near) && full(far));
            let late = plan.both.is_none_or(|limit| start.elapsed() >= limit);
            if pass >= plan.rounds && (late || !missing) {
                break;
            }
            if idle {
                thread::sleep(PAUSE);
            }
        }
        let seen = halves.into_iter().filter(|half| half.rounds().any(|count| count > 0));
        let seen: Vec<_> = seen.collect();
        if seen.is_empty() {
            return Err("each turn was disturbed, or the processors moved during it".into());
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::FAR_NS;

    const NEAR: f64 = FAR_NS / 2.0;
    const FAR: f64 = FAR_NS * 2.0;

    fn plan(rounds: u32, both: Option<Duration>) -> Plan {
        Plan { rounds, time: Duration::ZERO, both }
    }

    /// The places and the values of two contenders, whose figure is the number of the measurement. The
    /// looks find these round trips, and the last one again and again. A value is none if it is in
    /// `disturbed`.
    fn turns(plan: Plan, trips: &[f64], disturbed: &[f64]) -> Vec<(Distance, [Vec<f64>; 2])> {
        let (mut looks, mut number) = (0, 0.0);
        let look = || {
            looks += 1;
            Ok(Place::of(vec![trips[(looks - 1).min(trips.len() - 1)]]))
        };
        let measure = |_: &mut ()| {
            number += 1.0;
            Ok((!disturbed.contains(&number)).then_some([number]))
        };
        let mut turns = Turns { look, rest: |_| {}, measure };
        let halves = turns.take(plan, &mut [(), ()]).expect("something is measured");
        let of = |half: Half<1>| {
            let [a, b] =
                <[_; 2]>::try_from(half.values).expect("two contenders").map(|[list]| list);
            (half.distance, [a, b])
        };
        halves.into_iter().map(of).collect()
    }

    #[test]
    fn a_turn_belongs_to_its_place() {
        let all = turns(plan(2, None), &[NEAR], &[]);
        assert_eq!(all, [(Distance::Near, [vec![1.0, 3.0], vec![2.0, 4.0]])]);
        let trips = [NEAR, NEAR, NEAR, NEAR, FAR];
        let all = turns(plan(2, None), &trips, &[]);
        let near = (Distance::Near, [vec![1.0], vec![2.0]]);
        assert_eq!(all, [near, (Distance::Far, [vec![3.0], vec![4.0]])]);
    }

    #[test]
    fn a_turn_during_which_the_processors_move_is_repeated() {
        let all = turns(plan(1, None), &[NEAR, FAR], &[]);
        assert_eq!(all, [(Distance::Far, [vec![2.0], vec![3.0]])]);
    }

    #[test]
    fn a_turn_that_others_disturb_is_repeated() {
        let all = turns(plan(1, None), &[NEAR], &[1.0, 2.0]);
        assert_eq!(all, [(Distance::Near, [vec![3.0], vec![4.0]])]);
        let always: Vec<f64> = (1..=ATTEMPTS).map(f64::from).collect();
        let all = turns(plan(1, None), &[NEAR], &always);
        assert_eq!(all, [(Distance::Near, [vec![], vec![11.0]])]);
    }

    #[test]
    fn both_places_get_their_rounds_if_the_processors_move_in_time() {
        // Two rounds near, then two looks without a turn for each pass, and then the other place.
        let trips = [&[NEAR; 8][..], &[NEAR; 2], &[FAR]].concat();
        let all = turns(plan(2, Some(Duration::from_secs(600))), &trips, &[]);
        let near = (Distance::Near, [vec![1.0, 3.0], vec![2.0, 4.0]]);
        assert_eq!(all, [near, (Distance::Far, [vec![5.0, 7.0], vec![6.0, 8.0]])]);
    }

    #[test]
    fn the_wait_for_the_other_place_has_a_limit() {
        for limit in [Duration::ZERO, 3 * PAUSE] {
            let all = turns(plan(2, Some(limit)), &[FAR], &[]);
            assert_eq!(all, [(Distance::Far, [vec![1.0, 3.0], vec![2.0, 4.0]])]);
        }
    }

    #[test]
    fn the_only_processor_has_one_place() {
        let look = || Ok(Place::of(Vec::new()));
        let measure = |_: &mut ()| Ok(Some([1.0]));
        let mut turns = Turns { look, rest: |_| {}, measure };
        let plan = plan(3, Some(Duration::from_secs(600)));
        let halves: Vec<Half<1>> = turns.take(plan, &mut [()]).expect("something is measured");
        assert_eq!(halves.len(), 1);
        assert_eq!((halves[0].distance, halves[0].rounds().sum::<usize>()), (Distance::One, 3));
    }

    #[test]
    fn what_never_stands_still_has_no_figures() {
        let mut far = false;
        let look = || {
            far = !far;
            Ok(Place::of(vec![if far { FAR } else { NEAR }]))
        };
        let measure = |_: &mut ()| Ok(Some([1.0]));
        let mut turns = Turns { look, rest: |_| {}, measure };
        let halves: Result<Vec<Half<1>>> = turns.take(plan(2, None), &mut [()]);
        assert!(halves.is_err());
    }
}
