//! The crate's tests, as one program.

mod conversions;
mod memory;
