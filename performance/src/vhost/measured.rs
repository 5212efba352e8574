//! [`Programs`]: what the part is given. [`Measured`]: a table of it.

use std::path::Path;

use crate::report::{Table, Want};

/// What the part needs besides the plan.
#[derive(Clone, Copy)]
pub(crate) struct Programs<'a> {
    /// The `vmring` command.
    pub(crate) vmring: Option<&'a Path>,
    /// How long one TCP stream takes, in seconds.
    pub(crate) stream_seconds: u32,
    /// Only the tables whose name contains this text are measured.
    pub(crate) only: &'a str,
}

/// A table, or the reason why it cannot be measured here.
pub(super) type Measured = std::result::Result<(Table, Vec<Want>), String>;
