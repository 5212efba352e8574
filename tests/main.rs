//! Integration tests of vmring: one binary, one module per behaviour.

mod contracts;
mod device_body;
mod support;

mod model;
