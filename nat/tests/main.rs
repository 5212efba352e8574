//! The translator's tests. The traps that other translators have fallen into each have a script.

mod hostile;
mod policy;
mod real;
mod smoltcp_guest;
mod support;
mod tcp;
