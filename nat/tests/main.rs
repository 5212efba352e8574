//! The translator's tests. The traps that other translators have fallen into each have a script.

mod datagram;
mod dns;
mod forward;
mod hostile;
mod outbox;
mod policy;
mod real;
mod real_datagram;
mod real_dns;
mod real_route;
mod smoltcp_guest;
mod support;
mod tcp;
mod turns;
