//! Sequence numbers of TCP, which count bytes modulo 2^32 (RFC 9293, 3.4).
//!
//! Everything that compares them is here. Two numbers are compared by the half of the number space
//! that their difference is in, so they must be less than 2^31 apart. No window is larger than
//! 1 GiB (RFC 7323, 2.3), so they are.

/// A sequence number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seq(pub(crate) u32);

impl Seq {
    /// The number that is `bytes` further on.
    pub(crate) const fn add(self, bytes: u32) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// The number that is `bytes` further back.
    pub(crate) const fn sub(self, bytes: u32) -> Self {
        Self(self.0.wrapping_sub(bytes))
    }

    /// Whether this number comes before `other`.
    pub(crate) const fn before(self, other: Self) -> bool {
        (self.0.wrapping_sub(other.0) as i32) < 0
    }

    /// Whether this number comes after `other`.
    pub(crate) const fn after(self, other: Self) -> bool {
        other.before(self)
    }

    /// How many bytes this number is behind `earlier`, or 0 if it comes before it.
    pub(crate) const fn since(self, earlier: Self) -> u32 {
        if self.before(earlier) { 0 } else { self.0.wrapping_sub(earlier.0) }
    }

    /// The later of two numbers.
    pub(crate) const fn max(self, other: Self) -> Self {
        if self.before(other) { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Goal: comparisons hold everywhere, also where the numbers wrap.
        /// Method: numbers anywhere, and distances of up to 1 GiB.
        #[test]
        fn distances_do_not_depend_on_where_they_are(start: u32, distance in 1u32..1 << 30) {
            let (first, second) = (Seq(start), Seq(start).add(distance));
            prop_assert!(first.before(second) && second.after(first));
            prop_assert!(!second.before(first) && !first.before(first));
            prop_assert_eq!(second.since(first), distance);
            prop_assert_eq!(first.since(second), 0);
            prop_assert_eq!(first.max(second), second);
            prop_assert_eq!(second.sub(distance), first);
        }
    }
}
