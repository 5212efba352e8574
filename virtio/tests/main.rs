//! The crate's tests, as one program.

mod driver;
mod frontend;
mod net;
mod queue;
mod support;
