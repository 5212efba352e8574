//! A network without a gateway, and one with an uplink.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use common::*;
use macaddr::MacAddr6;
use vmring_embedded::{
    DropReason, Network, NetworkConfig, NetworkConfigError, OpenError, PortConfig, Registry,
    Sender, Sent,
};

fn switch() -> Arc<Network<Buffer>> {
    Network::new(NetworkConfig::switch()).unwrap()
}

/// Sends a frame as a batch of its own.
fn send(sender: &mut Sender<Buffer>, frame: &[u8]) -> Sent {
    let sent = sender.send(frame);
    sender.flush();
    sent
}

const IP: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 10);
const ALL: MacAddr6 = MacAddr6::broadcast();

// ---- A network without a gateway ----

#[test]
fn a_switch_answers_nothing_and_has_no_address() {
    let network = switch();
    assert!(network.gateway().is_none());
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    for frame in [arp_request(alice.mac, IP, SHARED), Dhcp::discover(alice.mac).frame()] {
        assert_eq!(send(&mut alice.sender, &frame), Sent::Flooded { reached: 1 });
        assert!(alice.receive().is_empty());
        assert_eq!(bob.receive(), [frame]);
    }
    assert_eq!(alice.sender.stats().sent_to_gateway, 0);
    assert_eq!((network.leases(), network.lease_of(alice.mac)), (vec![], None));
    // A gateway's address is an address like any other.
    let gateway = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
    let mac = gateway.gateway().unwrap().mac();
    let to_it = data(mac, alice.mac, b"anybody?");
    assert_eq!(send(&mut alice.sender, &to_it), Sent::Flooded { reached: 1 });
    let mut carol = Guest::with(&network, PortConfig { mac: Some(mac), ..config(3) });
    assert_eq!(send(&mut alice.sender, &to_it), Sent::Forwarded);
    assert_eq!(send(&mut carol.sender, &data(alice.mac, mac, b"here")), Sent::Forwarded);
    // An isolated port has nobody to talk to.
    let mut hermit = Guest::isolated(&network, 4);
    let isolated = Sent::Dropped(DropReason::Isolated);
    assert_eq!(send(&mut hermit.sender, &data(ALL, hermit.mac, b"")), isolated);
}

#[test]
fn settings_of_a_gateway_are_refused_without_one() {
    let config = NetworkConfig::switch();
    assert_eq!(config.check(), Ok(()));
    let first = Some(Ipv4Addr::new(192, 168, 64, 9));
    let reservations = vec![(ALL, IP)];
    let lease_file = Some(PathBuf::from("leases"));
    for (setting, config) in [
        ("dns", NetworkConfig { dns: vec![IP], ..config.clone() }),
        ("dhcp_first", NetworkConfig { dhcp_first: first, ..config.clone() }),
        ("reservations", NetworkConfig { reservations, ..config.clone() }),
        ("lease_file", NetworkConfig { lease_file, ..config.clone() }),
    ] {
        assert_eq!(config.check(), Err(NetworkConfigError::NoGateway { setting }));
        assert!(config.check().unwrap_err().to_string().contains(setting));
        assert!(Network::<Buffer>::new(config).is_err());
    }
    // A network of the same name with a gateway is another one.
    let registry = Registry::<Buffer>::new();
    let network = registry.open("lab", &config).unwrap();
    assert!(Arc::ptr_eq(&network, &registry.open("lab", &config).unwrap()));
    let conflict = registry.open("lab", &NetworkConfig::default()).unwrap_err();
    assert!(matches!(conflict, OpenError::Conflict { .. }));
    assert!(conflict.to_string().contains("with gateway no and not yes"), "{conflict}");
}
