//! Intervals of a measurement, each in one place of the processors.

use std::thread;
use std::time::{Duration, Instant};

use super::limits::LOOK_PAUSE;
use super::place::{Distance, Place, Processors};
use super::progress::Clock;
use super::setup::Setup;
use crate::failure::Failure;

/// What the intervals of one place were.
#[derive(Debug, PartialEq)]
pub(crate) struct InPlace<T> {
    /// `None` if there is only one processor, or if only one thread was measured.
    pub(crate) place: Option<Place>,
    pub(crate) intervals: Vec<T>,
}

/// The places that were seen, near before far.
pub(crate) type Places<T> = Vec<InPlace<T>>;

/// Measures intervals by `measure`, and returns them by the place where the processors were before and after
/// each. An interval during which they moved is repeated. With [`both`](Setup::both), goes on until either
/// place has all intervals, or until that time has passed. `processors` is `None` if only one thread is
/// measured.
pub(crate) fn measure<T>(
    setup: &Setup,
    processors: Option<&Processors>,
    clock: &mut Clock<'_>,
    measure: impl FnMut(Duration) -> Result<T, Failure>,
) -> Result<Places<T>, Failure> {
    by_looks(setup, || processors.and_then(Processors::look), clock, measure)
}

fn by_looks<T>(
    setup: &Setup,
    mut look: impl FnMut() -> Option<Place>,
    clock: &mut Clock<'_>,
    mut measure: impl FnMut(Duration) -> Result<T, Failure>,
) -> Result<Places<T>, Failure> {
    let (count, time) = setup.intervals();
    let count = count as usize;
    let index = |place: Place| usize::from(place.distance == Distance::Far);
    let mut places: [(Vec<f64>, Vec<T>); 2] = Default::default();
    let mut before = look();
    // Only two threads have places, and only processors that move have both.
    let deadline = setup.both.filter(|_| before.is_some()).map(|both| Instant::now() + both);
    let mut tries = 0;
    loop {
        let is_over = match deadline {
            Some(deadline) => {
                places.iter().all(|(_, intervals)| intervals.len() >= count)
                    || tries >= count && Instant::now() >= deadline
            }
            // Processors that move all the time leave fewer intervals, and not a run without an end.
            None => {
                places.iter().map(|(_, intervals)| intervals.len()).sum::<usize>() >= count
                    || tries >= 2 * count
            }
        };
        if is_over {
            break;
        }
        if before.is_some_and(|place| places[index(place)].1.len() >= count) {
            // The other place is waited for.
            thread::sleep(LOOK_PAUSE);
            before = look();
        } else {
            let interval = measure(time)?;
            tries += 1;
            let after = look();
            if before.map(|place| place.distance) == after.map(|place| place.distance) {
                let (trips, intervals) = &mut places[before.map_or(0, index)];
                trips.extend(before.into_iter().chain(after).map(|place| place.round_trip_ns));
                intervals.push(interval);
            }
            before = after;
        }
        if !clock.tick() {
            break;
        }
    }
    let seen = places.into_iter().filter(|(_, intervals)| !intervals.is_empty());
    Ok(seen.map(|(trips, intervals)| InPlace { place: Place::of(trips), intervals }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::faulty;
    use crate::stop::Stop;

    /// Measures intervals, which are numbers, while the processors are where `looks` says; in the end they stay
    /// where they are last. N is near, F is far, and anything else is no place.
    fn measured(both: Option<Duration>, looks: &str) -> Vec<(Option<f64>, Vec<u32>)> {
        let setup = Setup { both, ..faulty::setup() };
        let stop = Stop::new().unwrap();
        let mut clock = Clock::start(&stop, setup.time, None);
        let (mut looks, mut last) = (looks.chars(), ' ');
        let look = || {
            last = looks.next().unwrap_or(last);
            Place::of(match last {
                'N' => vec![130.0],
                'F' => vec![540.0],
                _ => vec![],
            })
        };
        let mut number = 0;
        let count = |_| {
            number += 1;
            Ok(number)
        };
        let places = by_looks(&setup, look, &mut clock, count).unwrap();
        let row = |of: InPlace<u32>| (of.place.map(|place| place.round_trip_ns), of.intervals);
        places.into_iter().map(row).collect()
    }

    const LONG: Option<Duration> = Some(Duration::from_secs(3600));

    #[test]
    fn an_interval_belongs_to_the_place_before_and_after_it() {
        let near = |intervals: &[u32]| (Some(130.0), intervals.to_vec());
        let far = |intervals: &[u32]| (Some(540.0), intervals.to_vec());
        assert_eq!(measured(None, "N"), [near(&[1, 2, 3, 4, 5])]);
        // During the second and the fourth interval they moved.
        assert_eq!(measured(None, "NNFFN"), [near(&[1, 5, 6, 7]), far(&[3])]);
        // They never stay. There are twice as many tries as intervals.
        assert_eq!(measured(None, &"NF".repeat(20)), []);
    }

    #[test]
    fn the_other_place_is_waited_for_if_both_are_wanted() {
        let (near, far) = ((Some(130.0), vec![1, 2, 3, 4, 5]), (Some(540.0), vec![6, 7, 8, 9, 10]));
        assert_eq!(measured(LONG, "NNNNNNNF"), [near.clone(), far]);
        // It never comes.
        assert_eq!(measured(Some(Duration::from_millis(1)), "N"), [near]);
    }

    #[test]
    fn one_thread_has_no_place_and_waits_for_none() {
        for both in [None, LONG] {
            assert_eq!(measured(both, "-"), [(None, vec![1, 2, 3, 4, 5])]);
        }
    }
}
