//! Starts: what a script does to them, and what the parameters say.

use std::ffi::{CStr, CString};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use block2::RcBlock;
use vmnet_sim::{Script, StartHandler, StartPlan, Value, World};

use crate::abi::{self, Pointer};
use crate::support::*;

/// Starts an interface in shared mode, in a world with this script.
fn start(change: impl FnOnce(&mut Script)) -> (World, [u8; 16], Start) {
    let world = World::new();
    let id = world.interface_id();
    world.script(id, change);
    (world, id, Start::of(&Description::shared(id)))
}

fn planned(change: impl FnOnce(&mut StartPlan)) -> (World, [u8; 16], Start) {
    start(|script| change(&mut script.start))
}

#[test]
fn a_start_can_be_refused_with_every_code() {
    guarded(|| {
        for status in [1001, 1002, 1003, 1005, 1009, 1010, 4711] {
            let (world, id, start) = planned(|plan| plan.status = status);
            assert!(start.handle.is_null());
            assert_eq!(start.answer(), (status, None));
            assert_eq!(world.counts(id).starts, 1);
            drop(start);
            assert!(world.unreleased(LONG).is_empty());
        }
    });
}

#[test]
fn a_refused_start_can_have_a_handle_which_is_to_be_stopped() {
    guarded(|| {
        let (world, id, start) = planned(|plan| {
            plan.status = FAILURE;
            plan.handle_on_failure = true;
        });
        assert!(!start.handle.is_null());
        assert_eq!(start.answer(), (FAILURE, None));
        assert_eq!(Interface::new(start, Parameters::new()).stop(), SUCCESS);
        assert_eq!(world.counts(id).stops, 1);
    });
}

#[test]
fn a_start_can_have_no_handle_and_succeed() {
    guarded(|| {
        let (_world, _, start) = planned(|plan| plan.no_handle = true);
        assert!(start.handle.is_null());
        assert_eq!(start.status(), SUCCESS);
    });
}

#[test]
fn a_handler_can_be_late_and_until_then_nothing_is_set_up() {
    guarded(|| {
        let late = Duration::from_millis(150);
        let first = Instant::now();
        loop {
            let began = Instant::now();
            let (_world, _, start) = planned(|plan| plan.handler = StartHandler::After(late));
            assert!(!start.handle.is_null());
            let answer = start.answer_within(SOON);
            let read = Packets::rooms(1, 1514).read(start.handle).0;
            let written = Packets::of(&[frame(BROADCAST, [2; 6], 1, 60)]).write(start.handle).0;
            if began.elapsed() >= late {
                // This thread was stopped for so long that the handler may have been called.
                assert!(first.elapsed() < LONG, "no attempt ends before its handler is called");
                continue;
            }
            assert_eq!((answer, read, written), (None, SETUP_INCOMPLETE, SETUP_INCOMPLETE));
            let interface = start.interface();
            interface.send(&frame(BROADCAST, [2; 6], 1, 60));
            return assert_eq!(interface.stop(), SUCCESS);
        }
    });
}

#[test]
fn a_handler_can_stay_away_and_keeps_what_it_has() {
    guarded(|| {
        let (world, _, start) = planned(|plan| plan.handler = StartHandler::Never);
        assert!(!start.handle.is_null());
        assert_eq!(start.answer_within(SOON), None);
        drop(start);
        let left = world.unreleased(SOON);
        assert!(left.contains(&"the start's handler"), "{left:?}");
        assert!(left.contains(&"the start's queue"), "{left:?}");
    });
}

#[test]
fn a_handler_can_be_called_twice_the_second_time_from_another_thread() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| script.start.handler = StartHandler::Twice);
        let (answer, answers) = channel();
        let handler = RcBlock::new(move |status: u32, parameters: Pointer| {
            let _ = answer.send((status, parameters.is_null(), thread::current().id()));
        });
        let (description, to) = (Description::shared(id), new_queue());
        // SAFETY: all arguments live until the handler has run.
        let handle = unsafe {
            abi::vmnet_start_interface(description.as_ptr(), queue(&to), block(&handler))
        };
        assert!(!handle.is_null());
        let [first, second] = [(); 2].map(|()| answers.recv_timeout(LONG).expect("a call"));
        assert_eq!((first.0, first.1), (SUCCESS, false));
        assert_eq!((second.0, second.1), (SUCCESS, false));
        assert_ne!(first.2, second.2);
        assert!(answers.recv_timeout(SOON).is_err());
        drop((handler, description, to));
        assert!(world.unreleased(LONG).is_empty());
    });
}

#[test]
fn parameters_can_be_missing_all_or_some() {
    guarded(|| {
        let (_world, _, start) = planned(|plan| plan.no_parameters = true);
        assert_eq!(start.answer(), (SUCCESS, None));

        let names = [
            "mtu",
            "max_packet_size",
            "interface_id",
            "mac_address",
            "start_address",
            "end_address",
            "subnet_mask",
            "nat66_prefix",
            "read_max_packets",
            "write_max_packets",
        ];
        for missing in names {
            let (_world, _, start) = planned(|plan| plan.missing = vec![missing]);
            let interface = start.interface();
            for name in names {
                assert_eq!(interface.parameters.contains_key(name), name != missing, "{name}");
            }
        }
    });
}

#[test]
fn the_parameters_are_what_a_healthy_mac_says() {
    guarded(|| {
        let (_world, id, interface) = one(|_| ());
        let number = |name| interface.number(name);
        assert_eq!((number("mtu"), number("max_packet_size")), (1500, 1514));
        assert_eq!((number("read_max_packets"), number("write_max_packets")), (256, 256));
        assert_eq!(interface.text("start_address"), "192.168.64.1");
        assert_eq!(interface.text("end_address"), "192.168.64.254");
        assert_eq!(interface.text("subnet_mask"), "255.255.255.0");
        assert!(interface.text("nat66_prefix").starts_with("fd"));
        assert_eq!(interface.parameters["interface_id"], Value::Uuid(id));
        assert_eq!(interface.mac()[0] & 3, 2); // unicast, local
    });
}

#[test]
fn the_sizes_are_the_scripts_or_as_asked_for() {
    guarded(|| {
        let (_world, _, interface) = one(|script| {
            script.mtu = Some(1400);
            script.max_packet_size = Some(2000);
        });
        assert_eq!((interface.number("mtu"), interface.max()), (1400, 2000));

        let world = World::new();
        let asked = |name: &str, value| {
            let description = Description::shared(world.interface_id()).with(name, value);
            let interface = Start::of(&description).interface();
            (interface.number("mtu"), interface.max())
        };
        assert_eq!(asked("mtu", Value::U64(9000)), (9000, 9014));
        assert_eq!(asked("enable_tso", Value::Bool(true)), (1500, 65_550));
        assert_eq!(asked("enable_virtio_header", Value::Bool(true)), (1500, 1514));
    });
}

#[test]
fn batch_limits_are_told_from_macos_15_on() {
    guarded(|| {
        for (macos, told) in [((14, 7), false), ((15, 0), true), ((26, 0), true)] {
            let world = World::new();
            world.set_host(|host| host.macos = macos);
            let id = world.interface_id();
            world.script(id, |script| {
                script.read_max_packets = Some(1);
                script.write_max_packets = Some(7);
            });
            let interface = Start::of(&Description::shared(id)).interface();
            let told_read = interface.parameters.get("read_max_packets");
            assert_eq!(told_read, told.then_some(&Value::U64(1)));
            let told_write = interface.parameters.get("write_max_packets");
            assert_eq!(told_write, told.then_some(&Value::U64(7)));
        }
        let (_world, _, interface) = one(|script| script.read_max_packets = None);
        assert!(!interface.parameters.contains_key("read_max_packets"));
        assert!(interface.parameters.contains_key("write_max_packets"));
    });
}

#[test]
fn the_mac_address_follows_from_the_identity_unless_the_script_honours_another() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        let mac = |honours| {
            world.script(id, |script| script.honours_mac = honours);
            let description =
                Description::shared(id).with("mac_address", text("02:00:00:00:00:99"));
            let interface = Start::of(&description).interface();
            let mac = interface.mac();
            assert_eq!(interface.stop(), SUCCESS);
            mac
        };
        let own = mac(false);
        assert_eq!(mac(false), own);
        assert_ne!(own, [2, 0, 0, 0, 0, 0x99]);
        assert_eq!(mac(true), [2, 0, 0, 0, 0, 0x99]);

        let description = Description::shared(world.interface_id());
        let without = description.with("allocate_mac_address", Value::Bool(false));
        assert!(!Start::of(&without).interface().parameters.contains_key("mac_address"));
    });
}

#[test]
fn each_mode_has_its_addresses() {
    guarded(|| {
        let world = World::new();
        let start = |mode, more: &[(&str, &str)]| {
            let mut description = Description::empty()
                .with("operation_mode", Value::U64(mode))
                .of(world.interface_id());
            for (name, value) in more {
                description = description.with(name, text(value));
            }
            Start::of(&description).interface()
        };
        assert_eq!(start(HOST_MODE, &[]).text("start_address"), "192.168.128.1");
        let bridged = start(BRIDGED_MODE, &[("shared_interface_name", "en1")]);
        for absent in ["start_address", "end_address", "subnet_mask", "nat66_prefix"] {
            assert!(!bridged.parameters.contains_key(absent), "{absent}");
        }
        let range = [
            ("start_address", "10.7.0.1"),
            ("end_address", "10.7.0.99"),
            ("subnet_mask", "255.255.0.0"),
            ("nat66_prefix", "fd12::"),
        ];
        let own = start(SHARED_MODE, &range);
        for (name, value) in range {
            assert_eq!(own.text(name), value);
        }
        let id = Value::Uuid([7; 16]);
        let isolated = Description::empty()
            .with("operation_mode", Value::U64(HOST_MODE))
            .of(world.interface_id())
            .with("network_identifier", id)
            .with("host_ip_address", text("10.8.0.1"))
            .with("host_subnet_mask", text("255.255.255.0"));
        assert_eq!(Start::of(&isolated).interface().text("start_address"), "10.8.0.1");
    });
}

#[test]
fn what_the_header_forbids_is_an_invalid_argument() {
    guarded(|| {
        let world = World::new();
        let yes = || Value::Bool(true);
        let cases: &[(u64, &[(&str, Value)])] = &[
            (999, &[]),
            (SHARED_MODE, &[("start_address", text("10.0.0.1"))]),
            (
                SHARED_MODE,
                &[
                    ("start_address", text("8.8.8.1")),
                    ("end_address", text("8.8.8.9")),
                    ("subnet_mask", text("255.255.255.0")),
                ],
            ),
            (SHARED_MODE, &[("shared_interface_name", text("en0"))]),
            (SHARED_MODE, &[("nat66_prefix", text("2001:db8::"))]),
            (HOST_MODE, &[("nat66_prefix", text("fd00::"))]),
            (SHARED_MODE, &[("network_identifier", Value::Uuid([1; 16]))]),
            (HOST_MODE, &[("host_ip_address", text("10.0.0.1"))]),
            (
                HOST_MODE,
                &[("host_ip_address", text("10.0.0.1")), ("host_subnet_mask", text("255.0.0.0"))],
            ),
            (SHARED_MODE, &[("mtu", Value::U64(67))]),
            (SHARED_MODE, &[("enable_virtio_header", yes()), ("enable_checksum_offload", yes())]),
            (BRIDGED_MODE, &[]),
            (BRIDGED_MODE, &[("shared_interface_name", text("en0")), ("mtu", Value::U64(1500))]),
            (BRIDGED_MODE, &[("shared_interface_name", text("en0")), ("enable_isolation", yes())]),
        ];
        for (mode, more) in cases {
            let mut description = Description::empty()
                .with("operation_mode", Value::U64(*mode))
                .of(world.interface_id());
            for (name, value) in *more {
                description = description.with(name, value.clone());
            }
            let start = Start::of(&description);
            assert_eq!(start.answer(), (INVALID_ARGUMENT, None), "{mode} {more:?}");
            assert!(start.handle.is_null());
        }
        let unknown = Description::empty()
            .with("operation_mode", Value::U64(BRIDGED_MODE))
            .of(world.interface_id())
            .with("shared_interface_name", text("en9"));
        assert_eq!(Start::of(&unknown).status(), FAILURE);
    });
}

#[test]
fn a_world_remembers_what_the_last_start_was_asked_for() {
    guarded(|| {
        let world = World::new();
        let id = world.interface_id();
        let description = Description::shared(id).with("enable_tso", Value::Bool(true));
        Start::of(&description).interface();
        let seen = world.description(id);
        assert_eq!(seen["enable_tso"], Value::Bool(true));
        assert_eq!(seen["operation_mode"], Value::U64(SHARED_MODE));
        assert_eq!(seen["interface_id"], Value::Uuid(id));
        assert_eq!(seen.len(), 3);
    });
}

#[test]
fn an_older_macos_lacks_the_newer_symbols() {
    guarded(|| {
        let world = World::new();
        let since: &[((u32, u32), &[&CStr])] = &[
            (
                (12, 0),
                &[
                    c"vmnet_enable_checksum_offload_key",
                    c"vmnet_interface_add_ip_port_forwarding_rule",
                    c"vmnet_interface_remove_ip_port_forwarding_rule",
                    c"vmnet_interface_get_ip_port_forwarding_rules",
                    c"vmnet_ip_port_forwarding_rule_get_details",
                ],
            ),
            ((15, 0), &[c"vmnet_read_max_packets_key", c"vmnet_write_max_packets_key"]),
            ((15, 4), &[c"vmnet_enable_virtio_header_key"]),
            (
                (26, 0),
                &[
                    c"vmnet_network_configuration_create",
                    c"vmnet_network_create",
                    c"vmnet_network_copy_serialization",
                    c"vmnet_interface_start_with_network",
                ],
            ),
        ];
        for macos in [(11, 0), (12, 0), (14, 7), (15, 0), (15, 3), (15, 4), (26, 0)] {
            world.set_host(|host| host.macos = macos);
            for (version, names) in since {
                for name in *names {
                    let found = world.enter(|| !vmnet_sim::symbol(name).is_null());
                    assert_eq!(found, macos >= *version, "{name:?} on {macos:?}");
                }
            }
            assert!(world.enter(|| vmnet_sim::symbol(c"vmnet_of_next_year").is_null()));
            assert!(world.enter(|| !vmnet_sim::symbol(c"CFRelease").is_null()));
            assert_eq!(world.enter(vmnet_sim::macos_version), macos);
        }
        assert!(world.enter(vmnet_sim::is_root));
        world.set_host(|host| host.root = false);
        assert!(!world.enter(vmnet_sim::is_root));
        // The symbol is a key's variable, whose value is the key's text.
        // SAFETY: a constant.
        let text = unsafe { *vmnet_sim::symbol(c"vmnet_read_max_packets_key").cast::<abi::Key>() };
        assert_eq!(text, key("read_max_packets"));
    });
}

#[test]
fn the_shared_interfaces_are_the_hosts() {
    guarded(|| {
        let world = World::new();
        let list = || {
            // SAFETY: the result is null, or an array with a reference that is ours.
            world.enter(|| unsafe {
                let array = abi::vmnet_copy_shared_interface_list();
                if array.is_null() {
                    return None;
                }
                assert_eq!(abi::xpc_get_type(array), &raw const abi::_xpc_type_array);
                let name = |i| CString::from(CStr::from_ptr(abi::xpc_array_get_string(array, i)));
                let names = (0..abi::xpc_array_get_count(array)).map(name).collect::<Vec<_>>();
                abi::xpc_release(array);
                Some(names)
            })
        };
        assert_eq!(list(), Some(vec![c"en0".to_owned(), c"en1".to_owned()]));
        world.set_host(|host| host.shared_interfaces = Some(Vec::new()));
        assert_eq!(list(), Some(Vec::new()));
        world.set_host(|host| host.shared_interfaces = None);
        assert_eq!(list(), None);
    });
}
