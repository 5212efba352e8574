//! Integration tests of vmring: one binary, one module per behaviour.

mod churn;
mod compile_fail;
mod contracts;
mod device_body;
mod guest_memory;
#[cfg(target_os = "linux")]
mod netns;
mod sockets;
mod support;

mod close;
#[cfg(target_os = "linux")]
mod embedded_ipv6;
mod embedded_offload;
#[path = "../embedded/tests/common/form.rs"]
mod form;
mod frontends;
mod liveness;
mod liveness_model;
mod messages;
mod model;
mod nat;
mod notify;
mod offload;
mod pcap;
mod pollers;
mod safe_api;
mod serde;
mod socket;
mod socket_clients;
mod software;
#[cfg(target_os = "linux")]
mod tap;
#[cfg(target_os = "linux")]
mod tap_guests;
#[cfg(target_os = "linux")]
mod tap_host;
#[cfg(target_os = "linux")]
mod tap_soak;
#[cfg(target_os = "linux")]
mod tap_traffic;
mod uplink;
#[cfg(not(target_os = "macos"))]
mod vmnet;
#[cfg(not(target_os = "macos"))]
mod vmnet_faults;
mod vmnet_on_a_mac;
#[cfg(not(target_os = "macos"))]
mod vmnet_probe;
