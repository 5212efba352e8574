//! Integration tests of vmring: one binary, one module per behaviour.

mod contracts;
mod device_body;
mod support;

mod frontends;
mod model;
mod serde;
