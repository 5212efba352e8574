//! The crate's tests, as one program.

mod driver;
mod queue;
mod support;
