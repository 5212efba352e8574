//! Where the host of a virtual machine has put the two processors on which the measuring threads run.

use std::fmt;

use serde::Serialize;

use crate::spread::Spread;

/// How far apart the two processors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Distance {
    /// There is only one.
    One,
    Near,
    Far,
}

/// What one look at the processors has found.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Place {
    pub(crate) distance: Distance,
    /// The median round trip of a cache line in nanoseconds. It is zero if there is one processor.
    pub(crate) round_trip_ns: f64,
    /// The number of turns that it is the median of.
    pub(crate) turns: usize,
}

/// A round trip of this many nanoseconds or more is between processors that are far apart. On the
/// machine of the figures it takes 130 ns or at least 490.
pub(crate) const FAR_NS: f64 = 250.0;

impl Place {
    /// The place where the round trips of a cache line take these nanoseconds. No round trip means
    /// that there is one processor.
    pub(crate) fn of(trips: Vec<f64>) -> Self {
        let (turns, round_trip_ns) = (trips.len(), Spread::of(trips).median);
        let distance = match round_trip_ns {
            _ if turns == 0 => Distance::One,
            ns if ns >= FAR_NS => Distance::Far,
            _ => Distance::Near,
        };
        Self { distance, round_trip_ns, turns }
    }
}

impl Distance {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Near => "near",
            Self::Far => "far",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.distance {
            Distance::One => f.write_str("only one processor"),
            distance => {
                let (name, ns) = (distance.name(), self.round_trip_ns);
                write!(f, "{name}, cache-line round trip {ns:.0} ns")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boundary_lies_between_the_two_places() {
        assert_eq!(Place::of(vec![FAR_NS - 1.0]).distance, Distance::Near);
        assert_eq!(Place::of(vec![FAR_NS]).distance, Distance::Far);
    }
}
