//! Network objects of macOS 26.

use std::net::Ipv4Addr;
use std::ptr;
use std::time::{Duration, Instant};

use libc::{in_addr, in6_addr};
use vmnet_sim::{ForwardMade, Value, World};

use crate::abi::{self, Pointer};
use crate::dhcp;
use crate::support::*;

const MASK: [u8; 4] = [255, 255, 255, 0];

fn addr(octets: [u8; 4]) -> in_addr {
    in_addr { s_addr: u32::from_ne_bytes(octets) }
}

/// A configuration or a network. Released when dropped.
struct Owned(Pointer);

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: our reference.
        unsafe { abi::CFRelease(self.0) }
    }
}

fn configuration(world: &World) -> Owned {
    let mut status = 0;
    // SAFETY: the status is valid for writing.
    let made = world.enter(|| unsafe {
        abi::vmnet_network_configuration_create(SHARED_MODE as u32, &mut status)
    });
    assert_eq!(status, SUCCESS);
    Owned(made)
}

fn subnet(of: &Owned, gateway: [u8; 4]) -> u32 {
    // SAFETY: a live configuration, and addresses that are valid for reading.
    unsafe { abi::vmnet_network_configuration_set_ipv4_subnet(of.0, &addr(gateway), &addr(MASK)) }
}

fn create(from: &Owned) -> Result<Owned, u32> {
    let mut status = 0;
    // SAFETY: a live configuration, and a status that is valid for writing.
    let network = unsafe { abi::vmnet_network_create(from.0, &mut status) };
    assert_eq!(network.is_null(), status != SUCCESS);
    if network.is_null() { Err(status) } else { Ok(Owned(network)) }
}

/// A network with this gateway.
fn with_gateway(world: &World, gateway: [u8; 4]) -> Result<Owned, u32> {
    let configuration = configuration(world);
    assert_eq!(subnet(&configuration, gateway), SUCCESS);
    create(&configuration)
}

fn gateway(of: &Owned) -> ([u8; 4], [u8; 4]) {
    let (mut gateway, mut mask) = (addr([0; 4]), addr([0; 4]));
    // SAFETY: a live network, and space for both results.
    unsafe { abi::vmnet_network_get_ipv4_subnet(of.0, &mut gateway, &mut mask) };
    (gateway.s_addr.to_ne_bytes(), mask.s_addr.to_ne_bytes())
}

fn join(world: &World, network: &Owned) -> Start {
    Start::on(Some(network.0), &Description::empty().of(world.interface_id()))
}

#[test]
fn interfaces_on_one_network_object_exchange_frames_and_get_leases() {
    guarded(|| {
        let world = World::new();
        let network = with_gateway(&world, [10, 1, 2, 1]).expect("a network");
        assert_eq!(gateway(&network), ([10, 1, 2, 1], MASK));
        let a = join(&world, &network).interface();
        let b = join(&world, &network).interface();
        // "Dropping the network after an interface started is fine."
        drop(network);
        assert_eq!(a.text("start_address"), "10.1.2.1");
        assert_eq!(a.text("end_address"), "10.1.2.254");
        a.send(&frame(b.mac(), a.mac(), 1, 60));
        assert_eq!(b.receive().len(), 1);
        let lease = dhcp::lease(&a, a.mac()).expect("a lease");
        assert_eq!(lease.address.octets()[..3], [10, 1, 2]);
        assert_eq!((a.stop(), b.stop()), (SUCCESS, SUCCESS));
        drop((a, b));
        assert!(world.unreleased(LONG).is_empty(), "{:?}", world.unreleased(SOON));
    });
}

#[test]
fn a_subnet_is_held_while_its_network_or_an_interface_on_it_exists() {
    guarded(|| {
        let world = World::new();
        let first = with_gateway(&world, [10, 1, 2, 1]).expect("a network");
        assert_eq!(with_gateway(&world, [10, 1, 2, 1]).err(), Some(FAILURE));
        assert_eq!(with_gateway(&world, [10, 1, 2, 77]).err(), Some(FAILURE));
        with_gateway(&world, [10, 1, 3, 1]).expect("another one");
        with_gateway(&World::new(), [10, 1, 2, 1]).expect("on another Mac");
        let interface = join(&world, &first).interface();
        drop(first);
        assert_eq!(with_gateway(&world, [10, 1, 2, 1]).err(), Some(FAILURE));
        assert_eq!(interface.stop(), SUCCESS);
        with_gateway(&world, [10, 1, 2, 1]).expect("it is free again");
    });
}

#[test]
fn a_network_without_a_subnet_gets_a_free_one() {
    guarded(|| {
        let world = World::new();
        let made = [(); 2].map(|()| create(&configuration(&world)).expect("a network"));
        let [first, second] = [&made[0], &made[1]].map(gateway);
        assert_eq!((first.1, second.1), (MASK, MASK));
        assert_eq!(first.0[..2], [192, 168]);
        assert_ne!(first.0, second.0);
        let (mut prefix, mut bits) = (in6_addr { s6_addr: [0; 16] }, 0);
        // SAFETY: a live network, and space for both results.
        unsafe { abi::vmnet_network_get_ipv6_prefix(made[0].0, &mut prefix, &mut bits) };
        assert_eq!((prefix.s6_addr[0], bits), (0xfd, 64));
    });
}

/// Measured: such a network can be created, and no interface starts on it.
#[test]
fn a_network_of_the_subnets_own_address_is_made_and_starts_nothing() {
    guarded(|| {
        let world = World::new();
        let network = with_gateway(&world, [10, 1, 2, 0]).expect("a network");
        let start = join(&world, &network);
        assert!(start.handle.is_null());
        assert_eq!(start.answer(), (FAILURE, None));
    });
}

#[test]
fn what_a_configuration_says_is_what_is_made() {
    guarded(|| {
        let world = World::new();
        let from = configuration(&world);
        assert_eq!(subnet(&from, [10, 9, 0, 1]), SUCCESS);
        let prefix = in6_addr { s6_addr: [0xfd, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] };
        let inner = [10_u8, 9, 0, 20];
        // SAFETY: each call gets a live configuration; the addresses are valid for reading.
        let statuses = unsafe {
            abi::vmnet_network_configuration_disable_nat44(from.0);
            abi::vmnet_network_configuration_disable_nat66(from.0);
            abi::vmnet_network_configuration_disable_dns_proxy(from.0);
            abi::vmnet_network_configuration_disable_router_advertisement(from.0);
            [
                abi::vmnet_network_configuration_set_external_interface(from.0, c"en1".as_ptr()),
                abi::vmnet_network_configuration_set_ipv6_prefix(from.0, &prefix, 64),
                abi::vmnet_network_configuration_set_mtu(from.0, 9000),
                abi::vmnet_network_configuration_add_dhcp_reservation(
                    from.0,
                    &[2, 0, 0, 0, 0, 7],
                    &addr(inner),
                ),
                abi::vmnet_network_configuration_add_port_forwarding_rule(
                    from.0,
                    6,
                    2,
                    80,
                    8080,
                    inner.as_ptr().cast(),
                ),
            ]
        };
        assert_eq!(statuses, [SUCCESS; 5]);
        let network = create(&from).expect("a network");
        // "Configuration is copied at create."
        drop(from);
        let made = world.networks_made();
        assert_eq!(made.len(), 1);
        let made = &made[0];
        assert_eq!(made.mode, SHARED_MODE);
        assert_eq!(made.gateway, Ipv4Addr::new(10, 9, 0, 1));
        assert_eq!(made.mask, Ipv4Addr::from(MASK));
        assert_eq!(made.prefix, Some((prefix.s6_addr, 64)));
        assert_eq!((made.mtu, made.external.as_deref()), (9000, Some("en1")));
        assert_eq!(made.off, ["nat44", "nat66", "dns proxy", "router advertisement"]);
        assert_eq!(made.reservations, [([2, 0, 0, 0, 0, 7], Ipv4Addr::from(inner))]);
        let [rule] = &made.rules[..] else { panic!("{:?}", made.rules) };
        let ForwardMade { protocol, external_port, address, internal_port, .. } = rule;
        assert_eq!((*protocol, *external_port, *internal_port), (6, 8080, 80));
        assert_eq!(*address, inner);

        let interface = join(&world, &network).interface();
        assert_eq!((interface.number("mtu"), interface.max()), (9000, 9014));
        let lease = dhcp::lease(&interface, [2, 0, 0, 0, 0, 7]).expect("a lease");
        assert_eq!(lease.address, Ipv4Addr::from(inner));
        let other = dhcp::lease(&interface, interface.mac()).expect("a lease");
        assert_ne!(other.address, Ipv4Addr::from(inner));
    });
}

#[test]
fn a_network_without_dhcp_gives_no_leases() {
    guarded(|| {
        let world = World::new();
        let from = configuration(&world);
        // SAFETY: a live configuration.
        unsafe { abi::vmnet_network_configuration_disable_dhcp(from.0) };
        let network = create(&from).expect("a network");
        assert_eq!(world.networks_made()[0].off, ["dhcp"]);
        let interface = join(&world, &network).interface();
        assert_eq!(dhcp::lease(&interface, interface.mac()), None);
    });
}

#[test]
fn a_configuration_refuses_what_cannot_be() {
    guarded(|| {
        let world = World::new();
        let mut status = 0;
        // SAFETY: the status is null or valid for writing.
        unsafe {
            let create = abi::vmnet_network_configuration_create;
            assert!(create(BRIDGED_MODE as u32, &mut status).is_null());
            assert_eq!(status, INVALID_ARGUMENT);
            assert!(create(BRIDGED_MODE as u32, ptr::null_mut()).is_null());
        }
        let of = configuration(&world);
        assert_eq!(subnet(&of, [8, 8, 8, 1]), INVALID_ARGUMENT);
        let twice = addr([192, 168, 100, 9]);
        // SAFETY: each call gets a live configuration; the addresses are valid for reading.
        unsafe {
            let reserve = abi::vmnet_network_configuration_add_dhcp_reservation;
            assert_eq!(reserve(of.0, &[2; 6], &twice), SUCCESS);
            assert_eq!(reserve(of.0, &[4; 6], &twice), INVALID_ARGUMENT);
            let external = abi::vmnet_network_configuration_set_external_interface;
            assert_eq!(external(of.0, c"en9".as_ptr()), INVALID_ARGUMENT);
            assert_eq!(abi::vmnet_network_configuration_set_mtu(of.0, 100), INVALID_ARGUMENT);
            let prefix = in6_addr { s6_addr: [0xfd; 16] };
            let set_prefix = abi::vmnet_network_configuration_set_ipv6_prefix;
            assert_eq!(set_prefix(of.0, &prefix, 129), INVALID_ARGUMENT);
            let forward = abi::vmnet_network_configuration_add_port_forwarding_rule;
            let inner = [0_u8; 16];
            assert_eq!(forward(of.0, 1, 2, 80, 80, inner.as_ptr().cast()), INVALID_ARGUMENT);
            assert_eq!(forward(of.0, 6, 10, 80, 80, inner.as_ptr().cast()), INVALID_ARGUMENT);
        }
    });
}

#[test]
fn a_creation_can_fail_and_take_long() {
    guarded(|| {
        let world = World::new();
        let delay = Duration::from_millis(80);
        world.plan_networks(|plan| {
            plan.status = 1002;
            plan.delay = delay;
        });
        let start = Instant::now();
        assert_eq!(create(&configuration(&world)).err(), Some(1002));
        assert!(start.elapsed() >= delay);
        assert!(world.networks_made().is_empty());
    });
}

#[test]
fn a_serialized_network_is_the_same_network() {
    guarded(|| {
        let world = World::new();
        let network = with_gateway(&world, [10, 1, 2, 1]).expect("a network");
        let mut status = 0;
        // SAFETY: a live network. The result is ours to release.
        let (serialized, other) = unsafe {
            let serialized = abi::vmnet_network_copy_serialization(network.0, &mut status);
            assert_eq!(status, SUCCESS);
            let other = abi::vmnet_network_create_with_serialization(serialized, &mut status);
            assert_eq!(status, SUCCESS);
            (serialized, Owned(other))
        };
        assert_eq!(gateway(&other), ([10, 1, 2, 1], MASK));
        let a = join(&world, &network).interface();
        let b = join(&world, &other).interface();
        a.send(&frame(b.mac(), a.mac(), 1, 60));
        assert_eq!(b.receive().len(), 1);
        assert_eq!((a.stop(), b.stop()), (SUCCESS, SUCCESS));
        drop((network, other, a, b));
        // SAFETY: it is ours, and it is used once more before its end.
        unsafe {
            let gone = abi::vmnet_network_create_with_serialization(serialized, &mut status);
            assert!(gone.is_null());
            assert_eq!(status, INVALID_ARGUMENT);
            abi::xpc_release(serialized);
            let nothing = Description::empty();
            let create = abi::vmnet_network_create_with_serialization;
            assert!(create(nothing.as_ptr(), &mut status).is_null());
        }
        assert_eq!(status, INVALID_ARGUMENT);
        assert!(world.unreleased(LONG).is_empty(), "{:?}", world.unreleased(SOON));
    });
}

#[test]
fn a_network_gives_the_mode_and_not_the_description() {
    guarded(|| {
        let world = World::new();
        let network = create(&configuration(&world)).expect("a network");
        let description = Description::shared(world.interface_id());
        assert_eq!(Start::on(Some(network.0), &description).status(), INVALID_ARGUMENT);
        let tso =
            Description::empty().of(world.interface_id()).with("enable_tso", Value::Bool(true));
        assert_eq!(Start::on(Some(network.0), &tso).interface().max(), 65_550);
    });
}

/// Measured: the functions fail at once and do not call their handler.
#[test]
fn forwarding_functions_refuse_an_interface_on_a_network_object() {
    guarded(|| {
        let world = World::new();
        let network = create(&configuration(&world)).expect("a network");
        let interface = join(&world, &network).interface();
        let (handler, answers) = status_block();
        let (of, inner) = (interface.handle, [0_u8; 16]);
        // SAFETY: a handle, and a live block.
        let statuses = unsafe {
            let (block, inner) = (block(&handler), inner.as_ptr().cast());
            [
                abi::vmnet_interface_add_port_forwarding_rule(of, 6, 80, addr([0; 4]), 80, block),
                abi::vmnet_interface_add_ip_port_forwarding_rule(of, 6, 80, 2, inner, 80, block),
                abi::vmnet_interface_remove_ip_port_forwarding_rule(of, 6, 80, 2, block),
                abi::vmnet_interface_remove_port_forwarding_rule(of, 6, 80, block),
                abi::vmnet_interface_get_port_forwarding_rules(of, block),
                abi::vmnet_interface_get_ip_port_forwarding_rules(of, 2, block),
            ]
        };
        assert_eq!(statuses, [FAILURE; 6]);
        assert!(answers.recv_timeout(SOON).is_err());
    });
}
