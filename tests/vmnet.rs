//! The vmnet driver over the simulated vmnet. There is a test for each fact about vmnet's ABI and
//! behaviour on which the driver depends. The facts are numbered rows, and each test is named after
//! its row. If Apple's documents leave a question open, the test tries both answers. (What every
//! device does is in `device_body`.)

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use vmnet_sim::{
    CallPlan, Dead, Events, ForwardMade, Reported, Rules, StartHandler, StopPlan, Value, World,
};
use vmring::device::vmnet::{self, IsolatedNetwork, Service};
use vmring::device::{Offloads, PortForward, Protocol};
use vmring::{
    Checksum, Direction, Drive, EntryError, Error, Gso, Interface, InterfaceBuilder, Ipv4Range,
    MacAddr6, Mode, OffloadHeader, RetryPolicy, Ring, RingOp, Status, Vmnet, VmnetNetwork,
};

use crate::support::{
    LONG, drive_to_rest, eventually, guarded, inline, number_of, packet_between, reap, reap_n,
    stage,
};

const SUCCESS: u32 = 1000;

fn builder(world: &World, id: [u8; 16]) -> InterfaceBuilder {
    Interface::builder().interface_id(id).device(world.enter(Vmnet::new))
}

fn start(world: &World, id: [u8; 16]) -> Interface {
    builder(world, id).start().expect("it starts")
}

/// Asserts that no object that passed through the ABI is left.
fn assert_released(world: &World) {
    stage("everything is released");
    assert_eq!(world.unreleased(LONG), [""; 0]);
}

/// Two interfaces on one network, each with an inline ring.
struct Pair {
    world: World,
    ids: [[u8; 16]; 2],
    interfaces: [Interface; 2],
    rings: [Ring; 2],
}

impl Pair {
    fn new(world: World) -> Self {
        Self::of(world, |_, builder| builder)
    }

    fn of(world: World, change: impl Fn(&World, InterfaceBuilder) -> InterfaceBuilder) -> Self {
        let ids = [world.interface_id(), world.interface_id()];
        Self::with(world, ids, change)
    }

    fn with(
        world: World,
        ids: [[u8; 16]; 2],
        change: impl Fn(&World, InterfaceBuilder) -> InterfaceBuilder,
    ) -> Self {
        let interfaces =
            ids.map(|id| change(&world, builder(&world, id)).start().expect("it starts"));
        let rings = [0, 1].map(|i: usize| {
            inline(&interfaces[i], Direction::Both)
                .depth(256)
                .retry(RetryPolicy { attempts: 3, delay: Duration::from_millis(1) })
                .build()
                .expect("a ring")
        });
        Self { world, ids, interfaces, rings }
    }

    fn packet(&self, number: u64, len: usize) -> Vec<u8> {
        let [from, to] = [0, 1].map(|i: usize| self.interfaces[i].mac().into_array());
        packet_between(from, to, number, len)
    }

    /// Submits packets of the first to the second, in one batch.
    fn send(&mut self, numbers: impl IntoIterator<Item = (u64, usize)>) {
        let frames: Vec<_> = numbers
            .into_iter()
            .map(|(number, len)| {
                let mut frame = self.rings[0].alloc().expect("a free frame");
                frame.copy_from(&self.packet(number, len)).expect("it fits");
                (frame, number)
            })
            .collect();
        let n = frames.len();
        assert_eq!(self.rings[0].submit_writes(frames).expect("they are taken"), n);
    }

    fn send_numbered(&mut self, numbers: std::ops::Range<u64>) {
        self.send(numbers.map(|number| (number, 60)));
    }

    /// Posts `n` reads at the second.
    fn post(&mut self, n: usize) {
        for i in 0..n {
            crate::support::post(&mut self.rings[1], i as u64);
        }
    }

    /// Completions of writes, by number.
    fn written(&mut self, n: usize) -> Vec<(u64, Result<usize, EntryError>)> {
        reap_n(&mut self.rings[0], n).iter().map(|done| (done.user_data, done.result)).collect()
    }

    /// The numbers of the next `n` packets that the second reads.
    fn received(&mut self, n: usize) -> Vec<u64> {
        let all = reap_n(&mut self.rings[1], n);
        all.iter()
            .map(|done| {
                done.result.expect("a packet");
                number_of(done.frame.as_ref().expect("a frame"))
            })
            .collect()
    }

    fn script(&self, end: usize, change: impl FnOnce(&mut vmnet_sim::Script)) {
        self.world.script(self.ids[end], change);
    }

    fn close(self) {
        drop(self.rings);
        for interface in &self.interfaces {
            interface.stop(LONG).expect("it stops");
        }
        drop(self.interfaces);
        assert_released(&self.world);
    }
}

fn all_well(n: u64) -> Vec<(u64, Result<usize, EntryError>)> {
    (0..n).map(|number| (number, Ok(60))).collect()
}

// 1.2 vmnet_return_t

#[test]
fn row_1_2_each_status_of_a_failed_write_is_the_error_of_its_completion() {
    guarded(|| {
        let mut pair = Pair::new(World::new());
        for code in (1001..=1010).chain([0, 999, 1011, u32::MAX]) {
            stage(format!("status {code}"));
            let status = Status::from_code(code).unwrap();
            if matches!(status, Status::BufferExhausted | Status::MemFailure) {
                continue; // these pass after a retry, see the tests below
            }
            // Both calls fail: the batch, and then the packet by itself.
            pair.script(0, |script| {
                let plan = CallPlan::Fails { status: code, sent: 0, reported: Reported::Asked };
                script.writes.extend([plan, plan]);
            });
            pair.send_numbered(0..1);
            assert_eq!(pair.written(1), [(0, Err(EntryError::Device(status)))]);
        }
        pair.send_numbered(0..1);
        assert_eq!(pair.written(1), all_well(1));
        // Each is counted under its own name.
        let stats = pair.rings[0].stats();
        assert_eq!(stats.errors_by_status.of(Status::NotAuthorized), 1);
        assert_eq!(stats.errors_by_status.of(Status::Unknown(1)), 4);
        assert_eq!((stats.errors, stats.errors_by_status.sum()), (12, 12));
        pair.close();
    });
}

#[test]
fn row_1_2_each_status_of_a_failed_read_is_the_error_of_one_completion() {
    guarded(|| {
        let mut pair = Pair::new(World::new());
        for code in (1001..=1010).chain([0, 999, 1011, u32::MAX]) {
            stage(format!("status {code}"));
            let status = Status::from_code(code).unwrap();
            if status == Status::BufferExhausted {
                continue; // "nothing there"
            }
            pair.script(1, |script| {
                let plan = CallPlan::Fails { status: code, sent: 0, reported: Reported::Asked };
                script.reads.push_back(plan);
            });
            pair.post(1);
            let done = reap_n(&mut pair.rings[1], 1);
            assert_eq!(done[0].brief(), (RingOp::Read, 0, Err(EntryError::Device(status))));
            assert!(done[0].frame.is_some());
        }
        pair.close();
    });
}

#[test]
fn row_1_2_1007_from_a_read_is_nothing_there_and_loses_nothing() {
    guarded(|| {
        let mut pair = Pair::new(World::new());
        let plan = CallPlan::Fails { status: 1007, sent: 0, reported: Reported::Asked };
        pair.script(1, |script| script.reads.extend([plan; 3]));
        pair.post(4);
        pair.send_numbered(0..4);
        assert_eq!(pair.written(4), all_well(4));
        assert_eq!(pair.received(4), [0, 1, 2, 3]);
        pair.close();
    });
}

#[test]
fn row_1_2_1007_and_1002_for_the_nth_write_are_tried_again_within_the_budget() {
    guarded(|| {
        for status in [1007, 1002] {
            let mut pair = Pair::new(World::new());
            pair.post(32);
            // The failure passes before the budget ends.
            let sent_some = CallPlan::Fails { status, sent: 4, reported: Reported::Done };
            let sent_none = CallPlan::Fails { status, sent: 0, reported: Reported::Zero };
            pair.script(0, |script| script.writes.extend([CallPlan::Well, sent_some, sent_none]));
            pair.send_numbered(0..1);
            assert_eq!(pair.written(1), all_well(1));
            pair.send_numbered(1..9);
            let done = pair.written(8);
            assert!(done.iter().all(|(_, result)| *result == Ok(60)), "{done:?}");
            assert_eq!(pair.received(9), (0..9).collect::<Vec<_>>());
            assert!(pair.rings[0].stats().retries > 0);

            // The failure does not pass. Each write then completes with that status, and the next
            // write is tried again.
            pair.script(0, |script| script.writes.extend([sent_none; 100]));
            pair.send_numbered(9..12);
            let done = pair.written(3);
            let exhausted = Err(EntryError::Device(Status::BufferExhausted));
            assert!(done.iter().all(|(_, result)| *result == exhausted), "{done:?}");
            pair.script(0, |script| script.writes.clear());
            pair.send_numbered(12..13);
            assert_eq!(pair.written(1), [(12, Ok(60))]);
            assert_eq!(pair.received(1), [12]);
            pair.close();
        }
    });
}

// 2.1 the interface API

#[test]
fn row_2_1_a_start_that_answers_null_is_a_failure_whether_the_handler_comes_or_not() {
    guarded(|| {
        for handler in [StartHandler::Prompt, StartHandler::Never] {
            let world = World::new();
            let id = world.interface_id();
            world.script(id, |script| {
                script.start.status = 1009;
                script.start.no_handle = true;
                script.start.handler = handler;
            });
            let began = Instant::now();
            let error = builder(&world, id).start().unwrap_err();
            // The error is the handler's status if the handler ran, else a general failure.
            match handler {
                StartHandler::Never => assert!(matches!(error, Error::Status(Status::Failure))),
                _ => assert!(matches!(error, Error::Status(Status::SharingServiceBusy))),
            }
            assert!(began.elapsed() < LONG, "it waited for a handler that nobody promised");
            assert_eq!((world.counts(id).starts, world.counts(id).stops), (1, 0));
            if handler == StartHandler::Prompt {
                assert_released(&world);
            }
        }
    });
}

#[test]
fn row_2_1_success_is_1000_and_any_other_number_is_a_failure() {
    guarded(|| {
        for code in (1001..=1010).chain([0, 1, 999, 1011, u32::MAX]) {
            for handle_on_failure in [false, true] {
                stage(format!("status {code}, with a handle: {handle_on_failure}"));
                let world = World::new();
                let id = world.interface_id();
                world.script(id, |script| {
                    script.start.status = code;
                    script.start.handle_on_failure = handle_on_failure;
                });
                let error = builder(&world, id).start().unwrap_err();
                let Error::Status(status) = error else { panic!("{error:?}") };
                assert_eq!(Some(status), Status::from_code(code));
                // The started interface is stopped.
                assert_eq!(world.counts(id).stops, u64::from(handle_on_failure));
                assert_released(&world);
            }
        }
    });
}

#[test]
fn row_2_1_parameters_may_be_null_and_then_the_interface_is_stopped_again() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| script.start.no_parameters = true);
        assert!(matches!(builder(&world, id).start(), Err(Error::Answer { .. })));
        assert_eq!(world.counts(id).stops, 1);
        assert_released(&world);
    });
}

#[test]
fn row_2_1_the_list_of_shared_interfaces_may_be_null() {
    let world = World::new();
    assert_eq!(world.enter(vmnet::shared_interfaces), ["en0", "en1"]);
    let interface = start(&world, world.interface_id());
    assert_eq!(world.enter(|| interface.shared_interfaces()).unwrap(), ["en0", "en1"]);
    world.set_host(|host| host.shared_interfaces = None);
    assert_eq!(world.enter(vmnet::shared_interfaces), [""; 0]);
}

// 2.2 port forwarding

fn forward(protocol: Protocol, outside: u16, inner: impl Into<IpAddr>, inside: u16) -> PortForward {
    PortForward {
        protocol,
        external_port: outside,
        internal_address: inner.into(),
        internal_port: inside,
    }
}

#[test]
fn row_2_2_forwarding_goes_through_whichever_functions_there_are() {
    guarded(|| {
        let four = forward(Protocol::Tcp, 8080, Ipv4Addr::new(192, 168, 64, 2), 80);
        let udp = forward(Protocol::Udp, 8080, Ipv4Addr::new(192, 168, 64, 3), 53);
        let six = forward(Protocol::Tcp, 8080, Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, 2), 8);
        for macos in [(11, 0), (12, 0), (26, 0)] {
            stage(format!("macOS {macos:?}"));
            let world = World::new();
            world.set_host(|host| host.macos = macos);
            let interface = start(&world, world.interface_id());
            assert_eq!(interface.port_forwards().unwrap(), [], "no rules are a null array");
            interface.add_port_forward(&four).unwrap();
            interface.add_port_forward(&udp).unwrap();
            assert!(matches!(
                interface.add_port_forward(&four),
                Err(Error::Status(Status::Failure))
            ));
            let mut expected = vec![four, udp];
            if macos >= (12, 0) {
                interface.add_port_forward(&six).unwrap();
                expected.push(six);
            } else {
                assert!(matches!(
                    interface.add_port_forward(&six),
                    Err(Error::NeedsMacos { version: "12", .. })
                ));
            }
            assert_eq!(interface.port_forwards().unwrap(), expected);
            // Both address families work.
            interface.remove_port_forward(Protocol::Tcp, 8080).unwrap();
            assert_eq!(interface.port_forwards().unwrap(), [udp]);
            // Removing a rule that does not exist is an error.
            assert!(matches!(
                interface.remove_port_forward(Protocol::Tcp, 8080),
                Err(Error::Status(Status::Failure))
            ));
            interface.stop(LONG).unwrap();
            drop(interface);
            assert_released(&world);
        }
    });
}

#[test]
fn row_2_2_on_a_network_object_forwarding_fails_at_once() {
    guarded(|| {
        let world = World::new();
        let network = world.enter(|| VmnetNetwork::builder(Mode::Shared).create()).unwrap();
        let interface = builder_on(&world, &network).start().unwrap();
        let rule = forward(Protocol::Tcp, 1, Ipv4Addr::new(192, 168, 100, 2), 1);
        let refused = [
            interface.add_port_forward(&rule),
            interface.remove_port_forward(Protocol::Tcp, 1),
            interface.port_forwards().map(drop),
        ];
        for refused in refused {
            let sentence = refused.unwrap_err().to_string();
            assert!(sentence.contains("VmnetNetworkBuilder::forward"), "{sentence}");
        }
    });
}

// 2.3 network objects

fn builder_on(world: &World, network: &VmnetNetwork) -> InterfaceBuilder {
    let id = world.interface_id();
    world.enter(|| Interface::builder().interface_id(id).network(network))
}

#[test]
fn row_2_3_a_network_object_is_as_it_was_asked_for() {
    guarded(|| {
        let world = World::new();
        let gateway = Ipv4Addr::new(192, 168, 77, 1);
        let mask = Ipv4Addr::new(255, 255, 255, 0);
        let prefix = Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0, 0);
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 7);
        let [four, six] = [
            forward(Protocol::Tcp, 2222, Ipv4Addr::new(192, 168, 77, 9), 22),
            forward(Protocol::Udp, 5353, Ipv6Addr::LOCALHOST, 53),
        ];
        let network = world
            .enter(|| {
                VmnetNetwork::builder(Mode::Shared)
                    .ipv4(gateway, mask)
                    .ipv6(prefix, 64)
                    .mtu(9000)
                    .external_interface("en1")
                    .without(Service::Nat44)
                    .without(Service::Nat66)
                    .without(Service::Dhcp)
                    .without(Service::DnsProxy)
                    .without(Service::RouterAdvertisement)
                    .reserve(mac, Ipv4Addr::new(192, 168, 77, 9))
                    .forward(four)
                    .forward(six)
                    .create()
            })
            .unwrap();
        assert_eq!((network.ipv4(), network.ipv6()), ((gateway, mask), (prefix, 64)));
        assert_eq!(network.mode(), &Mode::Shared);
        let [made] = &world.networks_made()[..] else { panic!("one network") };
        assert_eq!((made.mode, made.gateway, made.mask), (1001, gateway, mask));
        assert_eq!((made.prefix, made.mtu), (Some((prefix.octets(), 64)), 9000));
        assert_eq!(made.external.as_deref(), Some("en1"));
        assert_eq!(made.off, ["nat44", "nat66", "dhcp", "dns proxy", "router advertisement"]);
        assert_eq!(made.reservations, [(mac.into_array(), Ipv4Addr::new(192, 168, 77, 9))]);
        // That function takes the internal port before the external one. The driver must not mix
        // them up.
        let ports = |rule: &ForwardMade| (rule.protocol, rule.external_port, rule.internal_port);
        assert_eq!(
            made.rules.iter().map(ports).collect::<Vec<_>>(),
            [(6, 2222, 22), (17, 5353, 53)]
        );
        assert_eq!(made.rules[0].address, [192, 168, 77, 9]);
        assert_eq!(made.rules[1].address, Ipv6Addr::LOCALHOST.octets());

        // The network decides mode, addresses and MTU. It may be dropped after the start.
        let interface = builder_on(&world, &network).start().unwrap();
        drop(network);
        assert_eq!((interface.mode(), interface.mtu()), (Mode::Shared, 9000));
        assert_eq!(interface.info().ipv4.unwrap().start, gateway);
        let description = world.description(interface.interface_id());
        assert!(!description.contains_key("operation_mode"), "{description:?}");
        interface.stop(LONG).unwrap();
        drop(interface);
        assert_released(&world);
    });
}

#[test]
fn row_2_3_a_subnet_is_exclusive_while_its_network_exists() {
    guarded(|| {
        let world = World::new();
        let create = || {
            world.enter(|| {
                VmnetNetwork::builder(Mode::Host)
                    .ipv4(Ipv4Addr::new(192, 168, 90, 1), Ipv4Addr::new(255, 255, 255, 0))
                    .create()
            })
        };
        let first = create().unwrap();
        assert!(matches!(create(), Err(Error::Status(Status::Failure))));
        // An interface keeps the reservation.
        let interface = builder_on(&world, &first).start().unwrap();
        drop(first);
        assert!(create().is_err());
        interface.stop(LONG).unwrap();
        drop(interface);
        eventually("the reservation ends", || create().is_ok());
        assert_released(&world);
    });
}

#[test]
fn row_2_3_the_subnets_own_address_is_refused_before_vmnet_takes_it() {
    let world = World::new();
    let zero = world.enter(|| {
        VmnetNetwork::builder(Mode::Shared)
            .ipv4(Ipv4Addr::new(192, 168, 90, 0), Ipv4Addr::new(255, 255, 255, 0))
            .create()
    });
    assert!(matches!(zero, Err(Error::Status(Status::InvalidArgument))), "{zero:?}");
    assert!(world.networks_made().is_empty());
    assert_released(&world);
}

#[test]
fn row_2_3_bridged_mode_and_older_systems_have_no_network_objects() {
    let world = World::new();
    let bridged = world.enter(|| VmnetNetwork::builder(Mode::Bridged("en0".to_owned())).create());
    assert!(matches!(bridged, Err(Error::Config(_))), "{bridged:?}");
    world.set_host(|host| host.macos = (15, 7));
    let old = world.enter(|| VmnetNetwork::builder(Mode::Shared).create());
    assert!(matches!(old, Err(Error::NeedsMacos { version: "26", .. })), "{old:?}");
}

#[test]
fn row_2_3_a_creation_that_never_answers_is_given_up_and_one_without_privilege_says_so() {
    guarded(|| {
        let world = World::new();
        world.plan_networks(|plan| plan.delay = Duration::from_millis(300));
        let create =
            |timeout| world.enter(|| VmnetNetwork::builder(Mode::Shared).timeout(timeout).create());
        let short = Duration::from_millis(20);
        // A thread that is stopped for as long as the creation takes finds the network there.
        eventually("a creation is given up", || match create(short) {
            Err(Error::Timeout(after)) => after == short,
            Err(error) => panic!("{error}"),
            Ok(_) => false,
        });
        // The network that came too late is released.
        assert_released(&world);

        world.plan_networks(|plan| (plan.delay, plan.status) = (Duration::ZERO, 1002));
        world.set_host(|host| host.root = false);
        assert!(matches!(create(LONG), Err(Error::PermissionDenied { .. })));
        world.set_host(|host| host.root = true);
        assert!(matches!(create(LONG), Err(Error::Status(Status::MemFailure))));
    });
}

#[test]
fn row_2_3_a_serialized_network_is_the_same_network() {
    guarded(|| {
        let world = World::new();
        let network = world.enter(|| VmnetNetwork::builder(Mode::Host).create()).unwrap();
        let serialized = network.serialize().unwrap();
        let same = world.enter(|| VmnetNetwork::deserialize(&serialized, Mode::Host)).unwrap();
        assert_eq!(same.ipv4(), network.ipv4());
        drop((network, same));
        // The serialized form does not keep the network alive.
        let gone = world.enter(|| VmnetNetwork::deserialize(&serialized, Mode::Host));
        assert!(matches!(gone, Err(Error::Status(_))), "{gone:?}");
        drop(serialized);
        assert_released(&world);
    });
}

// 3 dictionary keys

fn described(pairs: &[(&str, Value)]) -> BTreeMap<String, Value> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

#[test]
fn row_3_the_description_says_what_was_asked_for_and_nothing_else() {
    let world = World::new();
    let described_as = |id, expected: &[(&str, Value)]| {
        assert_eq!(world.description(id), described(expected));
    };

    let id = world.interface_id();
    drop(start(&world, id));
    described_as(id, &[("operation_mode", Value::U64(1001)), ("interface_id", Value::Uuid(id))]);

    let id = world.interface_id();
    let range: Ipv4Range = "192.168.99.1/24".parse().unwrap();
    let vmnet = world.enter(Vmnet::new).nat66_prefix("fd00:1:2:3::".parse().unwrap());
    let interface = Interface::builder()
        .interface_id(id)
        .ipv4(range)
        .mtu(4000)
        .mac(MacAddr6::new(2, 0xab, 0, 0, 0, 1))
        .isolated(true)
        .device(vmnet)
        .start()
        .unwrap();
    described_as(
        id,
        &[
            ("operation_mode", Value::U64(1001)),
            ("interface_id", Value::Uuid(id)),
            ("start_address", text("192.168.99.1")),
            ("end_address", text(&range.end.to_string())),
            ("subnet_mask", text("255.255.255.0")),
            ("mtu", Value::U64(4000)),
            ("nat66_prefix", text("fd00:1:2:3::")),
            ("mac_address", text("02:ab:00:00:00:01")),
            ("allocate_mac_address", Value::Bool(false)),
            ("enable_isolation", Value::Bool(true)),
        ],
    );
    assert_eq!((interface.mtu(), interface.max_packet_size()), (4000, 4014));
    assert_eq!(interface.info().ipv4, Some(range));
    assert_eq!(interface.info().nat66_prefix, "fd00:1:2:3::".parse().ok());

    let id = world.interface_id();
    let isolated = IsolatedNetwork {
        identifier: [9; 16],
        host: Some((Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(255, 255, 0, 0))),
        host_ipv6: Some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
    };
    let vmnet = world.enter(Vmnet::new).isolated_network(isolated);
    drop(Interface::builder().interface_id(id).mode(Mode::Host).device(vmnet).start().unwrap());
    described_as(
        id,
        &[
            ("operation_mode", Value::U64(1000)),
            ("interface_id", Value::Uuid(id)),
            ("network_identifier", Value::Uuid([9; 16])),
            ("host_ip_address", text("10.0.0.1")),
            ("host_subnet_mask", text("255.255.0.0")),
            ("host_ipv6_address", text("fd00::1")),
        ],
    );

    let id = world.interface_id();
    let bridged = builder(&world, id).mode(Mode::Bridged("en1".to_owned())).start().unwrap();
    described_as(
        id,
        &[
            ("operation_mode", Value::U64(1002)),
            ("interface_id", Value::Uuid(id)),
            ("shared_interface_name", text("en1")),
        ],
    );
    assert_eq!(bridged.info().ipv4, None, "bridged interfaces have no addresses of their own");
}

/// The driver refuses what vmnet's header forbids without asking vmnet. vmnet would answer 1001 or
/// 1003, which do not say why.
#[test]
fn row_3_combinations_that_vmnet_forbids_are_refused_in_a_sentence() {
    let world = World::new();
    let id = world.interface_id();
    let new = || builder(&world, id);
    let bridged = || new().mode(Mode::Bridged("en0".to_owned()));
    let vmnet = |change: &dyn Fn(Vmnet) -> Vmnet| {
        Interface::builder().interface_id(id).device(change(world.enter(Vmnet::new)))
    };
    let prefix = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let isolated = IsolatedNetwork { identifier: [1; 16], host: None, host_ipv6: None };
    let offloads = |change: fn(&mut Offloads)| {
        let mut offloads = Offloads::default();
        change(&mut offloads);
        new().offloads(offloads)
    };
    // Each with the name of the setting.
    let refused = [
        (bridged().mtu(1500), "mtu"),
        (bridged().ipv4("192.168.99.1/24".parse().unwrap()), "ipv4"),
        (bridged().isolated(true), "isolated"),
        (vmnet(&|vmnet| vmnet.nat66_prefix(prefix("2001:db8::"))), "NAT66 prefix"),
        (vmnet(&|vmnet| vmnet.nat66_prefix(prefix("fd00::"))).mode(Mode::Host), "nat66_prefix"),
        (vmnet(&|vmnet| vmnet.isolated_network(isolated)), "isolated_network"),
        (offloads(|offloads| offloads.uso = true), "uso"),
        (offloads(|offloads| offloads.tso4 = true), "virtio_header"),
        (offloads(|offloads| offloads.tso6 = true), "virtio_header"),
    ];
    for (builder, setting) in refused {
        let error = builder.start().unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{setting}: {error:?}");
        assert!(error.to_string().contains(setting), "no {setting} in {error}");
    }
    assert_eq!(world.counts(id).starts, 0);
}

#[test]
fn row_3_every_parameter_but_the_sizes_may_be_missing() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        let all = [
            "mac_address",
            "interface_id",
            "start_address",
            "end_address",
            "subnet_mask",
            "nat66_prefix",
            "read_max_packets",
            "write_max_packets",
        ];
        world.script(id, |script| script.start.missing = all.to_vec());
        let interface = start(&world, id);
        let caps = interface.capabilities();
        assert_eq!((caps.max_read_batch, caps.max_write_batch), (200, 200));
        assert_eq!(interface.interface_id(), id);
        assert_eq!(interface.info().ipv4, None);
        assert!(interface.mac().into_array()[0] & 1 == 0, "a unicast MAC of our own");
        drop(interface);
        for size in ["mtu", "max_packet_size"] {
            world.script(id, |script| script.start.missing = vec![size]);
            assert!(matches!(builder(&world, id).start(), Err(Error::Answer { .. })), "{size}");
        }
        world.script(id, |script| script.start.missing.clear());
        // Impossible sizes are refused like missing ones.
        for (mtu, max) in [(1500, 13), (1500, 1 << 40), (9000, 1514), (u64::MAX, 1514)] {
            world.script(id, |script| {
                (script.mtu, script.max_packet_size) = (Some(mtu), Some(max));
            });
            assert!(
                matches!(builder(&world, id).start(), Err(Error::Answer { .. })),
                "{mtu} {max}"
            );
        }
        let counts = world.counts(id);
        assert_eq!(counts.starts, counts.stops);
        assert_released(&world);
    });
}

// 4.1 read

#[test]
fn row_4_1_a_read_with_nothing_waiting_succeeds_with_a_count_of_zero() {
    guarded(|| {
        let mut pair = Pair::new(World::new());
        pair.post(8);
        drive_to_rest(&mut pair.rings[1]);
        assert!(pair.world.counts(pair.ids[1]).reads > 0);
        assert_eq!(pair.rings[1].in_flight(), 8);
        pair.close();
    });
}

/// The simulator changes every field of the descriptors it is given, used or not, and aborts if one
/// comes back without being reset.
#[test]
fn row_4_1_descriptors_are_reset_before_every_read() {
    guarded(|| {
        let mut pair = Pair::new(World::new());
        pair.post(64);
        for round in 0..20_u64 {
            let n = 1 + round % 7;
            pair.send((0..n).map(|i| (round * 10 + i, 60 + 97 * i as usize)));
            assert_eq!(pair.written(n as usize).len(), n as usize);
            let expected: Vec<u64> = (0..n).map(|i| round * 10 + i).collect();
            assert_eq!(pair.received(n as usize), expected);
            pair.post(n as usize);
        }
        pair.close();
    });
}

// 4.2 write

/// Goal: whatever a write reports, each packet arrives, in order, and only once unless vmnet hid
/// that it had sent some.
#[test]
fn row_4_2_what_a_write_did_not_take_is_sent_afterwards() {
    guarded(|| {
        let fails = |status, sent, reported| CallPlan::Fails { status, sent, reported };
        let plans: &[(&[CallPlan], bool)] = &[
            (&[CallPlan::Takes(0)], true),
            (&[CallPlan::Takes(3)], true),
            (&[CallPlan::Takes(3), CallPlan::Takes(0), CallPlan::Takes(1)], true),
            (&[fails(1001, 0, Reported::Asked)], true),
            (&[fails(1001, 0, Reported::Zero)], true),
            (&[fails(1001, 0, Reported::Done)], true),
            (&[fails(1003, 5, Reported::Done)], true),
            (&[fails(1007, 5, Reported::Done), CallPlan::Takes(0)], true),
            // vmnet sent some and does not say so. The driver can only ensure that each arrives at
            // least once.
            (&[fails(1001, 5, Reported::Asked)], false),
            (&[fails(1001, 5, Reported::Zero)], false),
        ];
        for (plan, once) in plans {
            stage(format!("{plan:?}"));
            let mut pair = Pair::new(World::new());
            pair.post(64);
            pair.script(0, |script| script.writes.extend(*plan));
            pair.send_numbered(0..10);
            assert_eq!(pair.written(10), all_well(10));
            let expected: Vec<u64> = match once {
                true => (0..10).collect(),
                false => (0..5).chain(0..10).collect(),
            };
            assert_eq!(pair.received(expected.len()), expected);
            pair.close();
        }
    });
}

/// If vmnet refuses one packet, the others of the batch still succeed, whatever vmnet does to the
/// batch.
#[test]
fn row_4_2_a_packet_that_is_refused_fails_alone() {
    guarded(|| {
        for failed_batch in
            [(false, Reported::Asked), (false, Reported::Zero), (true, Reported::Done)]
        {
            stage(format!("{failed_batch:?}"));
            let mut pair = Pair::new(World::new());
            pair.script(0, |script| script.failed_batch = failed_batch);
            pair.post(16);
            // The third is no Ethernet frame.
            pair.send((0..6).map(|number| (number, if number == 2 { 13 } else { 60 })));
            let done = pair.written(6);
            for (number, result) in done {
                match number {
                    2 => assert_eq!(result, Err(EntryError::Device(Status::InvalidArgument))),
                    _ => assert_eq!(result, Ok(60)),
                }
            }
            assert_eq!(pair.received(5), [0, 1, 3, 4, 5]);
            pair.close();
        }
    });
}

// 4.4 batch limits

/// The simulator aborts on a count over the limit.
#[test]
fn row_4_4_batches_keep_to_the_limits_that_vmnet_tells_else_to_200() {
    guarded(|| {
        for (macos, told, limit) in [
            ((26, 0), Some(256), 256),
            ((26, 0), Some(200), 200),
            ((26, 0), Some(7), 7),
            ((26, 0), Some(1), 1),
            ((26, 0), Some(100_000), 1024),
            ((26, 0), None, 200),
            // macOS 14 does not report the limit.
            ((14, 0), Some(256), 200),
        ] {
            stage(format!("macOS {macos:?}, {told:?}"));
            let world = World::new();
            world.set_host(|host| host.macos = macos);
            let ids = [world.interface_id(), world.interface_id()];
            for id in ids {
                world.script(id, |script| {
                    (script.read_max_packets, script.write_max_packets) = (told, told);
                });
            }
            let mut pair = Pair::with(world, ids, |_, builder| builder);
            let caps = pair.interfaces[0].capabilities();
            assert_eq!((caps.max_read_batch, caps.max_write_batch), (limit, limit));
            pair.post(256);
            pair.send_numbered(0..256);
            assert_eq!(pair.written(256), all_well(256));
            assert_eq!(pair.received(256), (0..256).collect::<Vec<_>>());
            let counts = pair.world.counts(pair.ids[0]);
            assert_eq!(counts.writes, 256_u64.div_ceil(limit.into()), "one call a batch");
            pair.close();
        }
    });
}

// 4.5 events

#[test]
fn row_4_5_no_packet_waits_for_ever_whatever_events_mean() {
    guarded(|| {
        for events in [Events::Arrival, Events::Edge, Events::Level, Events::Lost] {
            for estimate in [Some(None), None, Some(Some(0)), Some(Some(u64::MAX))] {
                stage(format!("{events:?}, estimate {estimate:?}"));
                let world = World::new();
                let ids = [world.interface_id(), world.interface_id()];
                for id in ids {
                    world.script(id, |script| {
                        (script.events, script.estimate) = (events, estimate);
                        script.read_max_packets = Some(4);
                    });
                }
                let poll = (events == Events::Lost).then_some(Duration::from_millis(2));
                let interfaces = ids.map(|id| {
                    let vmnet = world.enter(Vmnet::new).safety_poll(poll);
                    Interface::builder().interface_id(id).device(vmnet).start().unwrap()
                });
                let [mut from, mut to] = [0, 1]
                    .map(|i: usize| interfaces[i].ring(Direction::Both).depth(64).build().unwrap());
                let macs = [0, 1].map(|i: usize| interfaces[i].mac().into_array());
                let counter = |name: &str| {
                    let counters: BTreeMap<_, _> = interfaces[1].counters().into_iter().collect();
                    counters[name]
                };
                let rescued = || counter("safety polls that found packets");
                let start = std::time::Instant::now();
                for round in 0.. {
                    // On a slow machine the receiver's poller may not have slept yet when the
                    // packets came.
                    let told = if events == Events::Lost { rescued() } else { counter("events") };
                    if round >= 10 && told > 0 {
                        break;
                    }
                    assert!(start.elapsed() < LONG, "neither a safety poll nor an event came");
                    (0..10).for_each(|i| crate::support::post(&mut to, i));
                    if round % 3 == 0 {
                        thread::sleep(Duration::from_millis(3)); // the receiver's poller sleeps
                    }
                    for number in round * 10..round * 10 + 10 {
                        let mut frame = from.alloc().unwrap();
                        frame.copy_from(&packet_between(macs[0], macs[1], number, 60)).unwrap();
                        from.submit_write(frame, number).unwrap();
                    }
                    let numbers: Vec<u64> = reap_n(&mut to, 10)
                        .iter()
                        .map(|done| number_of(done.frame.as_ref().unwrap()))
                        .collect();
                    assert_eq!(numbers, (round * 10..round * 10 + 10).collect::<Vec<_>>());
                    reap_n(&mut from, 10);
                }
                assert!(events != Events::Lost || counter("events") == 0);
                drop((from, to, interfaces));
                assert_released(&world);
            }
        }
    });
}

#[test]
fn row_4_5_a_packet_that_came_before_the_callback_was_set_is_read() {
    guarded(|| {
        for events in [Events::Arrival, Events::Edge, Events::Lost] {
            let world = World::new();
            let ids = [world.interface_id(), world.interface_id()];
            world.script(ids[1], |script| script.events = events);
            let [from, to] = ids.map(|id| start(&world, id));
            let mut sender = inline(&from, Direction::Write).build().unwrap();
            let mut frame = sender.alloc().unwrap();
            let [a, b] = [from.mac().into_array(), to.mac().into_array()];
            frame.copy_from(&packet_between(a, b, 5, 60)).unwrap();
            sender.submit_write(frame, 0).unwrap();
            assert_eq!(reap_n(&mut sender, 1)[0].result, Ok(60));
            let mut ring = to.ring(Direction::Read).build().unwrap();
            crate::support::post(&mut ring, 1);
            let done = reap_n(&mut ring, 1);
            assert_eq!(number_of(done[0].frame.as_ref().unwrap()), 5);
        }
    });
}

// 4.6 threads

/// The simulator aborts if two threads read or two threads write at once.
#[test]
fn row_4_6_one_ring_reads_and_several_write_one_at_a_time() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        // Calls last long enough to overlap.
        world.script(id, |script| script.call_cost = Duration::from_micros(200));
        let interface = start(&world, id);
        let peer = start(&world, world.interface_id());
        let _reader = interface.ring(Direction::Read).build().unwrap();
        assert!(matches!(
            interface.ring(Direction::Read).build(),
            Err(Error::TooManyRings { limit: 1, .. })
        ));
        let macs = [interface.mac().into_array(), peer.mac().into_array()];
        thread::scope(|scope| {
            for writer in 0..3_u64 {
                let mut ring = interface.ring(Direction::Write).depth(64).build().unwrap();
                scope.spawn(move || {
                    for number in 0..300 {
                        let mut frame = loop {
                            match ring.alloc() {
                                Some(frame) => break frame,
                                None => {
                                    ring.wait(1, Some(LONG));
                                    ring.reap().for_each(|done| assert!(done.result.is_ok()));
                                }
                            }
                        };
                        let packet = packet_between(macs[0], macs[1], writer * 1000 + number, 60);
                        frame.copy_from(&packet).unwrap();
                        ring.submit_write(frame, number).unwrap();
                    }
                    while ring.in_flight() > 0 {
                        ring.wait(1, Some(LONG));
                        ring.reap().for_each(|done| assert!(done.result.is_ok()));
                    }
                });
            }
        });
        assert_eq!(world.counts(interface.interface_id()).packets_written, 900);
    });
}

// 4.7 start, stop, order

#[test]
fn row_4_7_a_handler_that_comes_late_or_twice_is_a_start_like_any_other() {
    guarded(|| {
        for handler in [StartHandler::After(Duration::from_millis(80)), StartHandler::Twice] {
            let world = World::new();
            let id = world.interface_id();
            world.script(id, |script| script.start.handler = handler);
            let interface = start(&world, id);
            thread::sleep(Duration::from_millis(50)); // the second call
            interface.stop(LONG).unwrap();
            drop(interface);
            assert_eq!(world.counts(id).stops, 1);
            assert_released(&world);
        }
    });
}

/// A handler that comes after the timeout still finds its block, its queue and its context. They
/// are leaked on purpose, so they are never released.
#[test]
fn row_4_7_a_handler_that_comes_after_the_timeout_finds_everything_there() {
    guarded(|| {
        for (handler, retains) in [
            (StartHandler::After(Duration::from_millis(120)), false),
            (StartHandler::After(Duration::from_millis(120)), true),
            (StartHandler::Never, true),
        ] {
            let short = Duration::from_millis(30);
            let mut world = World::with(Rules::Strict, retains);
            // A thread that is stopped for as long as the handler is late finds its answer there.
            eventually("a start is given up", || {
                world = World::with(Rules::Strict, retains);
                let id = world.interface_id();
                world.script(id, |script| script.start.handler = handler);
                let vmnet = world.enter(Vmnet::new).start_timeout(short);
                match Interface::builder().interface_id(id).device(vmnet).start() {
                    Err(Error::StartTimeout(after)) => after == short,
                    Err(error) => panic!("{error}"),
                    Ok(_) => false,
                }
            });
            // The simulator aborts if it has to call a block that is gone.
            thread::sleep(Duration::from_millis(200));
            let left = world.unreleased(Duration::ZERO);
            assert!(left.contains(&"the start's handler"), "{left:?}");
            assert!(left.contains(&"the start's queue"), "{left:?}");
        }
    });
}

#[test]
fn row_4_7_a_stop_waits_for_its_handler_and_says_what_it_says() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();

        world.script(id, |script| script.stop.handler = Some(Duration::from_millis(100)));
        let interface = start(&world, id);
        let began = Instant::now();
        interface.stop(LONG).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(100), "it did not wait");
        drop(interface);
        assert_released(&world);

        world.script(id, |script| {
            script.stop.handler = Some(Duration::ZERO);
            script.stop.status = 1001;
        });
        let error = start(&world, id).stop(LONG).unwrap_err();
        assert!(
            matches!(&error, Error::Device(error) if matches!(**error, Error::Status(Status::Failure))),
            "{error:?}"
        );
        assert_released(&world);
    });
}

#[test]
fn row_4_7_a_stop_that_is_refused_or_never_answered_leaks_and_says_so() {
    guarded(|| {
        let world = World::new();
        let short = Duration::from_millis(50);
        let start = |plan: fn(&mut StopPlan)| {
            // A leaked interface keeps its MAC, so each one has an identity of its own.
            let id = world.interface_id();
            world.script(id, |script| plan(&mut script.stop));
            let vmnet = world.enter(Vmnet::new).stop_timeout(short);
            Interface::builder().interface_id(id).device(vmnet).start().unwrap()
        };
        let error = start(|stop| stop.handler = None).stop(LONG).unwrap_err();
        assert!(
            matches!(&error, Error::Device(error) if matches!(**error, Error::Timeout(after) if after == short)),
            "{error:?}"
        );

        let error = start(|stop| stop.refused = Some(1005)).stop(LONG).unwrap_err();
        assert!(
            matches!(&error, Error::Device(error) if matches!(**error, Error::Status(Status::InvalidAccess))),
            "{error:?}"
        );
        // A drop does the same without an error, and returns.
        drop(start(|stop| stop.refused = Some(1005)));
    });
}

/// The simulator aborts on a stop while the callback is set, while an event's block is gone, from a
/// job of the queue, or during another call.
#[test]
fn row_4_7_the_callback_is_off_and_its_queue_drained_before_the_stop() {
    guarded(|| {
        for retains in [true, false] {
            let world = World::with(Rules::Strict, retains);
            for _ in 0..20 {
                let ids = [world.interface_id(), world.interface_id()];
                // One event waits on the queue when the callback is removed.
                world.script(ids[1], |script| script.event_delay = Duration::from_millis(3));
                let [from, to] = ids.map(|id| start(&world, id));
                let macs = [from.mac().into_array(), to.mac().into_array()];
                let reader = to.ring(Direction::Read).build().unwrap();
                let mut writer = from.ring(Direction::Write).build().unwrap();
                // Events are under way during the stop.
                for number in 0..32 {
                    let mut frame = writer.alloc().unwrap();
                    frame.copy_from(&packet_between(macs[0], macs[1], number, 60)).unwrap();
                    writer.submit_write(frame, number).unwrap();
                }
                to.stop(LONG).unwrap();
                reap_n(&mut writer, 32);
                drop((reader, to, writer, from));
            }
            assert_released(&world);
        }
    });
}

/// A waker that runs on vmnet's queue drops the ring and the interface. The drop must not wait for
/// the job that it runs in.
#[test]
fn row_4_7_an_interface_dropped_inside_its_own_event_stops() {
    struct Dropper(Mutex<Option<(Ring, Interface)>>);
    impl Wake for Dropper {
        fn wake(self: Arc<Self>) {
            let owned = self.0.lock().unwrap().take();
            drop(owned);
        }
    }
    guarded(|| {
        let world = World::new();
        let ids = [world.interface_id(), world.interface_id()];
        let [from, to] = ids.map(|id| start(&world, id));
        let macs = [from.mac().into_array(), to.mac().into_array()];
        let mut ring = inline(&to, Direction::Read).build().unwrap();
        crate::support::post(&mut ring, 1);
        drive_to_rest(&mut ring);
        let dropper = Arc::new(Dropper(Mutex::new(None)));
        let waker = Waker::from(dropper.clone());
        assert!(ring.poll_ready(&mut Context::from_waker(&waker), 1).is_pending());
        *dropper.0.lock().unwrap() = Some((ring, to));

        let mut writer = inline(&from, Direction::Write).build().unwrap();
        let mut frame = writer.alloc().unwrap();
        frame.copy_from(&packet_between(macs[0], macs[1], 1, 60)).unwrap();
        writer.submit_write(frame, 1).unwrap();
        reap_n(&mut writer, 1);
        eventually("the stop", || world.counts(ids[1]).stops == 1);
        assert!(dropper.0.lock().unwrap().is_none());
        drop((writer, from));
        assert_released(&world);
    });
}

// 4.8 privilege

#[test]
fn row_4_8_a_start_without_privilege_says_what_is_needed_on_this_macos() {
    let needs = |macos, root, code| {
        let world = World::new();
        world.set_host(|host| (host.macos, host.root) = (macos, root));
        let id = world.interface_id();
        world.script(id, |script| script.start.status = code);
        match builder(&world, id).start() {
            Err(Error::PermissionDenied { needs }) => Ok(needs),
            Err(Error::Status(status)) => Err(status.code().expect("a code")),
            other => panic!("{other:?}"),
        }
    };
    for code in [1001, 1002, 1005, 1010] {
        for macos in [(11, 0), (13, 5), (15, 6)] {
            let text = needs(macos, false, code).unwrap();
            let version = format!("macOS {}", macos.0);
            for said in ["root", "com.apple.vm.networking", &version, &code.to_string()] {
                assert!(text.contains(said), "{said}: {text}");
            }
            assert!(!text.contains("com.apple.security.virtualization"), "{text}");
        }
        for macos in [(26, 0), (27, 1)] {
            let text = needs(macos, false, code).unwrap();
            for said in ["root", "com.apple.security.virtualization", "ad hoc"] {
                assert!(text.contains(said), "{said}: {text}");
            }
        }
        // Root has the privilege, so the status means something else.
        assert_eq!(needs((26, 0), true, code), Err(code));
    }
    for code in [1003, 1004, 1006, 1009, 4711] {
        assert_eq!(needs((26, 0), false, code), Err(code));
    }
}

// 4.9 sizes with offloads

fn virtio() -> Offloads {
    let mut offloads = Offloads::default();
    offloads.virtio_header = true;
    offloads.tso4 = true;
    offloads.tso6 = true;
    offloads
}

/// It is not known whether the 65,550 bytes include the 12 bytes of the header. The buffers are
/// large enough for both.
#[test]
fn row_4_9_the_largest_packet_goes_through_whether_it_includes_the_header_or_not() {
    guarded(|| {
        for header_in_max in [false, true] {
            stage(format!("header in max_packet_size: {header_in_max}"));
            let world = World::new();
            let ids = [world.interface_id(), world.interface_id()];
            for id in ids {
                world.script(id, |script| script.header_in_max = header_in_max);
            }
            let mut pair = Pair::with(world, ids, |_, builder| builder.offloads(virtio()));
            let caps = pair.interfaces[0].capabilities();
            assert_eq!((caps.mtu, caps.max_packet_size, caps.headroom), (1500, 65_550, 12));
            assert!(caps.offloads.tso4 && caps.offloads.tso6 && caps.offloads.checksum);
            let description = pair.world.description(ids[0]);
            assert_eq!(description["enable_virtio_header"], Value::Bool(true));
            assert_eq!(description["enable_tso"], Value::Bool(true));
            assert!(!description.contains_key("enable_checksum_offload"), "both is an error");

            let header = OffloadHeader {
                checksum: Checksum::Partial { start: 34, offset: 16 },
                gso: Gso::TcpV4,
                segment_size: 1448,
                header_len: 54,
                ..OffloadHeader::NONE
            };
            pair.post(3);
            for (number, len) in [(0, 60), (1, 1514), (2, 65_226)] {
                let mut frame = pair.rings[0].alloc().unwrap();
                frame.copy_from(&pair.packet(number, len)).unwrap();
                if len > 1514 {
                    frame.set_offload(&header).unwrap();
                }
                pair.rings[0].submit_write(frame, number).unwrap();
            }
            for (number, result) in pair.written(3) {
                assert_eq!(result, Ok([60, 1514, 65_226][number as usize]), "without the header");
            }
            let received = reap_n(&mut pair.rings[1], 3);
            for (number, done) in received.iter().enumerate() {
                let frame = done.frame.as_ref().unwrap();
                let len = [60, 1514, 65_226][number];
                assert_eq!(done.result, Ok(len));
                assert!(frame[..] == pair.packet(number as u64, len)[..], "packet {number}");
                let header_read = frame.offload().unwrap().expect("one was negotiated");
                let expected = if len > 1514 { header } else { OffloadHeader::NONE };
                assert_eq!(
                    (header_read.gso, header_read.checksum),
                    (expected.gso, expected.checksum)
                );
                assert_eq!(header_read.num_buffers, 1, "what virtio 1.x guests want");
            }
            pair.close();
        }
    });
}

#[test]
fn row_4_9_without_offloads_there_is_no_header_and_each_key_is_of_its_macos() {
    let world = World::new();
    let caps = start(&world, world.interface_id()).capabilities();
    assert_eq!(
        (caps.max_packet_size, caps.headroom, caps.offloads),
        (1514, 0, Offloads::default())
    );

    let mut checksum = Offloads::default();
    checksum.checksum = true;
    let id = world.interface_id();
    let interface = builder(&world, id).offloads(checksum).start().unwrap();
    assert_eq!(world.description(id)["enable_checksum_offload"], Value::Bool(true));
    assert_eq!(interface.capabilities().headroom, 0);
    for (macos, offloads, version) in
        [((11, 6), checksum, "12"), ((14, 0), virtio(), "15.4"), ((15, 3), virtio(), "15.4")]
    {
        world.set_host(|host| host.macos = macos);
        let error = builder(&world, world.interface_id()).offloads(offloads).start().unwrap_err();
        assert!(
            matches!(error, Error::NeedsMacos { version: needed, .. } if needed == version),
            "{error:?}"
        );
    }
    world.set_host(|host| host.macos = (15, 4));
    builder(&world, world.interface_id()).offloads(virtio()).start().unwrap();
}

// 4.10 addresses

#[test]
fn row_4_10_a_mac_that_was_asked_for_is_the_interfaces_whether_vmnet_follows_or_not() {
    let mac = MacAddr6::new(2, 0x11, 0x22, 0x33, 0x44, 0x55);
    for honours_mac in [true, false] {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| script.honours_mac = honours_mac);
        assert_eq!(builder(&world, id).mac(mac).start().unwrap().mac(), mac);
    }
    // Without a requested MAC, the same identity has the same MAC.
    let world = World::new();
    let id = world.interface_id();
    let first = start(&world, id).mac();
    assert_eq!(start(&world, id).mac(), first);
}

// 4.11 sleep, wake, restart

/// After the host has slept, the interface is dead in one of several ways. A restart brings it back
/// with its rings, frames and numbers, its identity, and its forwarded ports.
#[test]
fn row_4_11_a_restart_revives_what_did_not_survive_the_hosts_sleep() {
    guarded(|| {
        for dead in [Dead::Silent, Dead::Fails(1001), Dead::Fails(1003)] {
            stage(format!("{dead:?}"));
            let world = World::new();
            let ids = [world.interface_id(), world.interface_id()];
            let [from, to] = ids.map(|id| start(&world, id));
            let (mac, id) = (to.mac(), to.interface_id());
            let rule = forward(Protocol::Udp, 4000, Ipv4Addr::new(192, 168, 64, 2), 4000);
            to.add_port_forward(&rule).unwrap();
            let mut writer = from.ring(Direction::Write).drive(Drive::Thread).build().unwrap();
            let mut reader = to.ring(Direction::Both).drive(Drive::Thread).build().unwrap();
            world.sleep(id, dead);
            (0..4).for_each(|number| crate::support::post(&mut reader, number));
            if dead == Dead::Silent {
                to.restart(LONG).unwrap();
            }
            for (number, done) in reap_n(&mut reader, 4).into_iter().enumerate() {
                let expected = match dead {
                    Dead::Silent => EntryError::Cancelled,
                    Dead::Fails(code) => EntryError::Device(Status::from_code(code).unwrap()),
                };
                assert_eq!(done.brief(), (RingOp::Read, number as u64, Err(expected)));
                assert!(done.frame.is_some());
            }
            if dead != Dead::Silent {
                to.restart(LONG).unwrap();
            }
            assert_eq!((to.mac(), to.interface_id(), reader.control().closed()), (mac, id, None));
            assert_eq!(world.description(id)["interface_id"], Value::Uuid(id));
            assert_eq!(to.port_forwards().unwrap(), [rule]);
            crate::support::post(&mut reader, 9);
            let mut frame = writer.alloc().unwrap();
            frame
                .copy_from(&packet_between(from.mac().into_array(), mac.into_array(), 77, 60))
                .unwrap();
            writer.submit_write(frame, 1).unwrap();
            let done = reap_n(&mut reader, 1);
            assert_eq!(done[0].brief(), (RingOp::Read, 9, Ok(60)));
            assert_eq!(number_of(done[0].frame.as_ref().unwrap()), 77);
            assert_eq!((world.counts(id).starts, world.counts(id).stops), (2, 1));
            reap_n(&mut writer, 1);
            drop((done, reader, writer, from, to));
            assert_released(&world);
        }
    });
}

#[test]
fn row_4_11_a_restart_that_fails_says_so_and_the_next_one_may_succeed() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        let interface = start(&world, id);
        let mut ring = interface.ring(Direction::Both).build().unwrap();
        world.script(id, |script| script.start.status = 1009);
        assert!(interface.restart(LONG).is_err());
        // The ring closes because its device is gone.
        eventually("the ring closes", || ring.control().closed().is_some());
        world.script(id, |script| script.start.status = SUCCESS);
        assert_eq!(reap(&mut ring).len(), 0);
    });
}

// 5 XPC, libdispatch, Blocks

/// vmnet probably keeps its own references to blocks and queues, but this is documented nowhere.
/// Without such references everything works, because ours live long enough; the simulator aborts if
/// one does not. With them everything is released exactly once; the simulator counts.
#[test]
fn row_5_blocks_queues_and_objects_live_as_long_as_vmnet_may_use_them_and_no_longer() {
    guarded(|| {
        for retains in [true, false] {
            stage(format!("vmnet retains: {retains}"));
            let world = World::with(Rules::Strict, retains);
            let mut pair = Pair::new(world.clone());
            pair.post(100);
            pair.send_numbered(0..100);
            assert_eq!(pair.written(100), all_well(100));
            assert_eq!(pair.received(100).len(), 100);
            let rule = forward(Protocol::Tcp, 1, Ipv4Addr::new(192, 168, 64, 2), 1);
            pair.interfaces[0].add_port_forward(&rule).unwrap();
            assert_eq!(pair.interfaces[0].port_forwards().unwrap(), [rule]);
            pair.interfaces[0].remove_port_forward(Protocol::Tcp, 1).unwrap();
            // While the interface runs, exactly the objects that it needs exist.
            let during = world.unreleased(Duration::from_millis(100));
            assert!(during.contains(&"the event callback"), "{during:?}");
            assert!(!during.contains(&"the description"), "{during:?}");
            assert!(!during.contains(&"the parameters"), "{during:?}");
            pair.close();
        }
    });
}
