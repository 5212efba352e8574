//! Integration tests of the simulated vmnet: one binary, with one module for each subject.

#![cfg(not(target_os = "macos"))]

mod abi;
mod dhcp;
mod support;

mod calls;
mod events;
mod forwarding;
mod network;
mod start;
mod stop;
mod strict;
mod wire;
