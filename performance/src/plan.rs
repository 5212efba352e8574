//! What every part is asked for, and its result.

use std::time::Duration;

use crate::report::{Table, Want};
use crate::result::Result;

/// How long and how often to measure.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) rounds: u32,
    /// How long one measurement takes.
    pub(crate) time: Duration,
    /// Whether a table of two threads waits until both places of the processors were seen, and how long
    /// it may take.
    pub(crate) both: Option<Duration>,
}

/// The result of a part.
pub(crate) type Part = Result<(Vec<Table>, Vec<Want>)>;
