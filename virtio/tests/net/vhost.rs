//! The whole way: front ends on one side, `serve_connection` on the other.

use std::io::{Read, Write};
use std::time::Duration;

use vmring_virtio::net::{Ended, Features, NetSettings, ServeError, VhostUserNet};
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES, ProtocolFeature};

use crate::frontend::*;
use crate::net::guest::{frame, interface, of_flow, readable, wide_interface};
use crate::net::remote::{Remote, Server, regions};
use crate::net::wire::wire;
use crate::support::{LONG, eventually, guarded, is_constant};

/// Two guests on one network, each behind a server.
fn two(network: &str, without: Features) -> [(Server, Remote); 2] {
    [0, 1].map(|_| {
        let (server, socket) = Server::new(interface(network));
        (server, Remote::new(socket, without))
    })
}

fn exchange(network: &'static str, without: Features) {
    guarded(network, move || {
        let [(sa, mut a), (mut sb, mut b)] = two(network, without);
        b.post(&[2048], 64);
        a.post(&[2048], 64);
        // The rings run before the first packet.
        a.sync();
        b.sync();
        for number in 0..50 {
            let there = frame(a.mac, b.mac, 60 + number as usize * 20, number);
            a.send(&there);
            assert_eq!(b.receive(1), [there]);
            let back = frame(b.mac, a.mac, 1514, number);
            b.send(&back);
            assert_eq!(a.receive(1), [back]);
        }
        let (_, ended) = sa.stop();
        assert_eq!(ended.expect("it ends well"), Ended::Stopped);
        drop(b.frontend);
        let (_, ended) = sb.join();
        assert_eq!(ended.expect("it ends well"), Ended::Closed);
    });
}

#[test]
fn packets_both_ways_with_event_indices() {
    exchange("vhost-user, event indices", Features::NONE);
}

#[test]
fn packets_both_ways_with_flags_and_without_order() {
    exchange("vhost-user, flags", Features::EVENT_IDX | Features::IN_ORDER);
}

#[test]
fn an_idle_server_sleeps() {
    guarded("an idle server", || {
        let [(sa, mut a), (sb, mut b)] = two("idle", Features::NONE);
        a.post(&[2048], 64);
        b.post(&[2048], 64);
        a.sync();
        b.sync();
        let packet = frame(a.mac, b.mac, 100, 1);
        a.send(&packet);
        assert_eq!(b.receive(1), [packet]);
        let wakes = || [&sa, &sb].map(|server| server.stats.stats().wakes);
        eventually("they have slept", || wakes().iter().all(|wakes| *wakes > 0));
        eventually("they sleep", || is_constant(wakes));
    });
}

#[test]
fn a_replaced_call_is_signalled_once_and_then_used() {
    guarded("a replaced call", || {
        let [(_sa, mut a), (_sb, mut b)] = two("calls", Features::NONE);
        b.post(&[2048], 8);
        let (call, call_end) = std::io::pipe().unwrap();
        b.frontend.send(&Sent::number(SET_VRING_CALL, 0).with(&call_end));
        b.sync();
        assert!(readable(&call, Duration::ZERO), "it may have missed an interrupt");
        b.rings[0].call = call;
        a.sync();
        let packet = frame(a.mac, b.mac, 100, 1);
        a.send(&packet);
        assert_eq!(b.receive(1), [packet]);
        // Without a call the guest polls, and packets arrive as well.
        b.frontend.send(&Sent::number(SET_VRING_CALL, NO_DESCRIPTOR));
        b.sync();
        let packet = frame(a.mac, b.mac, 100, 2);
        a.send(&packet);
        let mut came = Vec::new();
        while came.is_empty() {
            came = b.rings[0].driver.collect();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(came[0].len, 112);
    });
}

#[test]
fn a_guest_survives_the_end_of_its_server() {
    guarded("a new server", || {
        let [(sa, mut a), (mut sb, mut b)] = two("new server", Features::NONE);
        b.post(&[2048], 128);
        a.sync();
        b.sync();
        for round in 0..5 {
            let packet = frame(a.mac, b.mac, 100, round);
            a.send(&packet);
            assert_eq!(b.receive(1), [packet]);
            let (device, ended) = sb.stop();
            assert_eq!(ended.expect("it ends well"), Ended::Stopped);
            // Everything that was posted is available again.
            let socket;
            (sb, socket) = Server::with(device);
            b = b.reconnect(socket);
            b.sync();
        }
        drop((a, sa, b, sb));
    });
}

#[test]
fn the_base_of_a_ring_is_behind_what_was_used() {
    guarded("vring base", || {
        let [(_sa, mut a), (_sb, mut b)] = two("base", Features::NONE);
        b.post(&[2048], 32);
        a.sync();
        b.sync();
        for number in 0..3 {
            a.send(&frame(a.mac, b.mac, 100, number));
            assert_eq!(b.receive(1).len(), 1);
        }
        assert_eq!(b.base(0), 3, "32 are available, and 3 are used");
        assert_eq!(a.base(1), a.rings[1].driver.used_index());
        // A ring that is started again looks at what is there, without a kick.
        // The used ring says where it goes on, even if the front end names another index.
        b.set_up(0, 20);
        a.set_up(1, 3);
        a.sync();
        b.sync();
        let packet = frame(a.mac, b.mac, 100, 9);
        a.send(&packet);
        assert_eq!(b.receive(1), [packet]);
    });
}

#[test]
fn a_disabled_ring_of_a_front_end() {
    guarded("disabled rings", || {
        let [(sa, mut a), (_sb, mut b)] = two("vhost disabled", Features::NONE);
        b.post(&[2048], 8);
        a.enable(1, false);
        a.sync();
        b.sync();
        a.send(&frame(a.mac, b.mac, 100, 1));
        while a.rings[1].driver.used_index() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(sa.stats.stats().tx_disabled, 1, "it was taken and dropped");
        a.enable(1, true);
        b.enable(0, false);
        a.sync();
        b.sync();
        // The network keeps it until the ring is enabled.
        let packet = frame(a.mac, b.mac, 100, 2);
        a.send(&packet);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(b.rings[0].driver.used_index(), 0);
        b.enable(0, true);
        assert_eq!(b.receive(1), [packet]);
    });
}

#[test]
fn regions_come_and_go_under_traffic() {
    guarded("memory regions", || {
        let [(_sa, mut a), (_sb, mut b)] = two("regions", Features::NONE);
        b.post(&[2048], 64);
        a.sync();
        b.sync();
        let extra = memory(0x1_0000);
        let region = Region {
            guest_address: 0x9000_0000,
            size: 0x1_0000,
            user_address: 0x7e00_0000_0000,
            mmap_offset: 0,
        };
        for number in 0..20 {
            a.send(&frame(a.mac, b.mac, 200, number));
            let request = if number % 2 == 0 { ADD_MEM_REG } else { REM_MEM_REG };
            let message = Sent::region(request, region);
            let message = if number % 2 == 0 { message.with(&extra) } else { message };
            b.frontend.send(&message);
            assert_eq!(b.receive(1), [frame(a.mac, b.mac, 200, number)]);
        }
        b.sync();
        assert!(matches!(copies(&extra), None | Some(1)), "the region that is gone is unmapped");
    });
}

#[test]
fn what_is_written_is_in_the_log_of_a_migration() {
    guarded("a migration", || {
        let [(_sa, mut a), (_sb, mut b)] = two("migration", Features::NONE);
        b.post(&[2048], 8);
        a.sync();
        b.sync();
        let log = memory(0x10_0000);
        let bytes = [0x10_0000u64.to_ne_bytes(), [0; 8]].concat();
        b.frontend.send(&Sent::new(SET_LOG_BASE, bytes).with(&log));
        b.frontend.reply();
        let features = b.features.bits() | PROTOCOL_FEATURES;
        b.frontend.send(&Sent::number(SET_FEATURES, features | LOG_ALL));
        b.sync();
        let buffer = b.rings[0].driver.buffers(0)[0];
        let packet = frame(a.mac, b.mac, 300, 1);
        a.send(&packet);
        assert_eq!(b.receive(1), [packet]);
        // The log has a bit for each page of 4 KiB.
        let is_dirty = |address: u64| {
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&log, &mut byte, address >> 15).unwrap();
            byte[0] >> (address >> 12 & 7) & 1 != 0
        };
        assert!(is_dirty(buffer.address));
        assert!(is_dirty(crate::net::guest::layout(0, 256).used), "and the used ring");
        assert!(!is_dirty(buffer.address + 0x2_0000), "and nothing else");
        // The log ends while packets go on.
        b.frontend.send(&Sent::number(SET_FEATURES, features));
        let packet = frame(a.mac, b.mac, 300, 2);
        a.send(&packet);
        assert_eq!(b.receive(1), [packet]);
    });
}

#[test]
fn a_broken_ring_needs_a_reset_and_the_front_end_is_told() {
    guarded("needs reset", || {
        let (mut server, socket) = Server::new(interface("needs reset"));
        let mut remote = Remote::new(socket, Features::NONE);
        let (mut error, error_end) = std::io::pipe().unwrap();
        remote.frontend.send(&Sent::number(SET_VRING_ERR, 1).with(&error_end));
        remote.sync();
        remote.rings[1].driver.set_available_index(0x4000);
        remote.rings[1].kick.write_all(&[1; 8]).unwrap();
        assert!(readable(&error, LONG));
        error.read_exact(&mut [0; 8]).unwrap();
        remote.frontend.send(&Sent::new(GET_STATUS, []));
        assert_eq!(remote.frontend.reply().number() & 0x40, 0x40);
        assert_eq!(server.stats.stats().broken_queues, 1);
        drop(remote);
        let (_, ended) = server.join();
        assert_eq!(ended.expect("it ends well"), Ended::Closed);
    });
}

#[test]
fn legacy_drivers_and_rings_without_a_kick_end_the_connection() {
    guarded("what is refused", || {
        let (mut server, socket) = Server::new(interface("refused"));
        let mut remote = Remote::over(socket, memory(0x90_0000), Features::VERSION_1);
        remote.set_up(0, 0);
        let (device, ended) = server.join();
        let error = ended.expect_err("a legacy driver has other headers");
        assert!(matches!(error, ServeError::Protocol(_)), "{error:?}");
        let (mut server, socket) = Server::with(device);
        let mut remote = Remote::over(socket, memory(0x90_0000), Features::NONE);
        remote.set_up(1, 0);
        remote.sync();
        remote.frontend.send(&Sent::number(SET_VRING_KICK, 1 | NO_DESCRIPTOR));
        let (_, ended) = server.join();
        let error = ended.expect_err("nobody polls");
        assert!(matches!(error, ServeError::Protocol(_)), "{error:?}");
        assert_eq!(regions().len(), 2);
    });
}

#[test]
fn a_guest_that_moved_here_is_announced() {
    guarded("rarp", || {
        let [(_sa, a), (_sb, mut b)] = two("vhost rarp", Features::NONE);
        b.post(&[2048], 8);
        b.sync();
        let mut payload = a.mac.to_vec();
        payload.resize(8, 0);
        a.frontend.send(&Sent::new(SEND_RARP, payload));
        let packets = b.receive(1);
        assert_eq!((packets[0].len(), &packets[0][6..12]), (60, &a.mac[..]));
        assert_eq!(packets[0][12..14], [0x80, 0x35]);
    });
}

#[test]
fn the_state_of_a_device_goes_to_another_server() {
    guarded("device state", || {
        let (_sa, socket) = Server::new(interface("state"));
        let from = Remote::over(socket, memory(0x90_0000), Features::NONE);
        let (_sb, socket) = Server::new(interface("state"));
        let to = Remote::over(socket, memory(0x90_0000), Features::NONE);
        let check = |remote: &Remote| {
            remote.frontend.send(&Sent::new(CHECK_DEVICE_STATE, []));
            remote.frontend.reply().number()
        };
        let (mut reader, writer) = std::io::pipe().unwrap();
        from.frontend.send(&Sent::new(SET_DEVICE_STATE_FD, u32s(&[0, 0])).with(&writer));
        assert_eq!(from.frontend.reply().number(), NO_DESCRIPTOR);
        assert_eq!(check(&from), 0);
        drop(writer);
        let mut state = Vec::new();
        reader.read_to_end(&mut state).unwrap();
        for (bytes, answer) in [(&state[..], 0), (&state[..state.len() - 1], 1)] {
            let (reader, mut writer) = std::io::pipe().unwrap();
            to.frontend.send(&Sent::new(SET_DEVICE_STATE_FD, u32s(&[1, 0])).with(&reader));
            assert_eq!(to.frontend.reply().number(), NO_DESCRIPTOR);
            writer.write_all(bytes).unwrap();
            drop(writer);
            assert_eq!(check(&to), answer);
        }
    });
}

#[test]
fn a_report_knows_the_front_end() {
    guarded("a report", || {
        let (mut server, socket) = Server::new(interface("report"));
        let handle = server.front_end.clone();
        let remote = Remote::new(socket, Features::EVENT_IDX);
        remote.sync();
        eventually("the report", || handle.get().session.messages > 10);
        let known = handle.get();
        assert!(known.connected && !known.sealed, "a file without seals: {known:?}");
        assert_eq!((known.features, known.mac), (remote.features, remote.mac));
        drop(remote);
        assert!(matches!(server.join().1, Ok(Ended::Closed)));
        assert!(!handle.get().connected);
    });
}

/// Front ends start the rings of all pairs, and enable those that the guest uses.
#[test]
fn pairs_are_enabled_one_by_one() {
    guarded("several pairs", || {
        let ([interface, _], control) = wire(|caps| caps.reading_rings = 2);
        let mut settings = NetSettings::default();
        settings.queue_pairs = 2;
        let device = VhostUserNet::new(interface, settings).unwrap();
        let (_server, socket) = Server::with(device);
        let mut remote = Remote::wide(socket, memory(0x90_0000), Features::NONE, 4);
        assert!(remote.features.has(Features::MQ));
        for index in 0..4 {
            remote.set_up(index, 0);
        }
        (0..2).for_each(|index| remote.enable(index, true));
        for index in [0, 2] {
            let ring = &mut remote.rings[index];
            (0..20).for_each(|_| assert!(ring.driver.post(&[(2048, true)], None).is_some()));
            ring.driver.expose();
            remote.kick(index);
        }
        remote.sync();
        let mut used = [0; 2];
        let mut send = |remote: &Remote, expected: [u16; 2]| {
            for flow in 0..2 {
                let mut packet = frame([2; 6], [4; 6], 60, 0);
                packet[14] = flow;
                control.inject(0, [0; 12], packet);
            }
            (used[0], used[1]) = (used[0] + expected[0], used[1] + expected[1]);
            let began = std::time::Instant::now();
            let now = || [0, 2].map(|index| remote.rings[index].driver.used_index());
            while now() != used {
                assert!(began.elapsed() < LONG, "{:?} instead of {used:?}", now());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        send(&remote, [2, 0]);
        (2..4).for_each(|index| remote.enable(index, true));
        remote.sync();
        send(&remote, [1, 1]);
        (2..4).for_each(|index| remote.enable(index, false));
        remote.sync();
        send(&remote, [2, 0]);
    });
}

/// A front end with two pairs on the embedded network gets packets on both, on each those of its flows, and
/// all on one while the other is disabled.
#[test]
fn a_network_serves_both_pairs_of_a_front_end() {
    guarded("two pairs on a network", || {
        let name = "vhost pairs";
        let mut settings = NetSettings::default();
        settings.queue_pairs = 2;
        let device = VhostUserNet::new(wide_interface(name, 2), settings).unwrap();
        let (server, socket) = Server::with(device);
        let mut remote = Remote::wide(socket, memory(0x90_0000), Features::NONE, 4);
        let (_other, socket) = Server::new(interface(name));
        let mut sender = Remote::new(socket, Features::NONE);
        sender.sync();
        for index in 0..4 {
            remote.set_up(index, 0);
            remote.enable(index, true);
        }
        for index in [0, 2] {
            let ring = &mut remote.rings[index];
            (0..200).for_each(|_| assert!(ring.driver.post(&[(2048, true)], None).is_some()));
            ring.driver.expose();
            remote.kick(index);
        }
        remote.sync();
        // How many packets of 32 flows each pair gets.
        let mut send = |remote: &Remote| {
            let used = || [0, 2].map(|index| remote.rings[index].driver.used_index());
            let before = used();
            for flow in 0..32 {
                sender.send(&of_flow(sender.mac, remote.mac, flow));
            }
            let came = || [0, 1].map(|pair| used()[pair] - before[pair]);
            eventually("all packets", || came().iter().sum::<u16>() == 32);
            came()
        };
        let both = send(&remote);
        assert!(both.iter().all(|count| *count > 2), "{both:?}");
        for (pair, other) in [(0, 1), (1, 0)] {
            remote.enable(pair * 2, false);
            remote.sync();
            assert_eq!(send(&remote)[other], 32);
            remote.enable(pair * 2, true);
            remote.sync();
            assert_eq!(send(&remote), both, "its flows come back");
        }
        drop(remote.frontend);
        let mut server = server;
        assert!(matches!(server.join().1, Ok(Ended::Closed)));
    });
}

#[test]
fn a_stop_does_not_wait_for_a_front_end_that_waits() {
    guarded("a stop", || {
        let ([interface, _other], control) = wire(|_| {});
        let device = VhostUserNet::new(interface, NetSettings::default()).unwrap();
        let (server, socket) = Server::with(device);
        let mut remote = Remote::new(socket, Features::NONE);
        remote.sync();
        control.hold(true);
        remote.send(&frame(remote.mac, [2, 0, 0, 0, 0, 9], 100, 1));
        eventually("the interface has it", || control.taken() == 1);
        // The session waits for the packet, and then for nothing.
        remote.frontend.send(&Sent::state(GET_VRING_BASE, 1, 0));
        std::thread::sleep(Duration::from_millis(50));
        let releases = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            control.hold(false);
        });
        let (_, ended) = server.stop();
        assert!(matches!(ended, Ok(Ended::Stopped)), "{ended:?}");
        releases.join().unwrap();
        assert_eq!(remote.rings[1].driver.used_index(), 1);
    });
}

/// A front end that cannot read the space gets no features whose values are in it.
#[test]
fn a_hidden_configuration_space_promises_nothing() {
    guarded("a hidden configuration", || {
        let in_space = Features::MAC | Features::STATUS;
        for config in [true, false] {
            let device = VhostUserNet::new(interface("hidden"), NetSettings::default()).unwrap();
            let (_server, socket) = Server::with_config(device, config);
            let frontend = Frontend::on(socket);
            frontend.send(&Sent::new(GET_FEATURES, []));
            let offered = Features::from_bits(frontend.reply().number());
            assert_eq!((offered.has(in_space), offered.has(Features::MTU)), (config, config));
            assert!(offered.has(Features::MRG_RXBUF | Features::RING_RESET));
            // Linux refuses a device that offers what needs a control queue without one.
            for needing in [Features::CTRL_VQ, Features::CTRL_RX, Features::GUEST_ANNOUNCE] {
                assert!(!offered.has(needing));
            }
            assert!(!offered.has(Features::MQ), "there is one pair");
            // A front end that tells the guest an MTU itself asks again.
            frontend.send(&Sent::number(SET_PROTOCOL_FEATURES, ProtocolFeature::Mtu.bit()));
            frontend.send(&Sent::new(GET_FEATURES, []));
            assert!(Features::from_bits(frontend.reply().number()).has(Features::MTU));
        }
    });
}
