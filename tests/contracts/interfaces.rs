//! Rings on one interface, and what an interface reports and counts.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmring::device::{PortForward, Progress, Protocol};
use vmring::{
    Direction, Embedded, Error, Interface, Loopback, MacAddr6, Mode, Ring, RingOp, Status,
    SubmitErrorKind,
};

use super::pool;
use crate::support::{
    LONG, Script, ScriptQueue, every_way, guarded, inline, loopback, number_of, packet_between,
    post, quiet_network, reap_n, send, unique,
};

#[test]
fn one_ring_too_many_is_a_typed_error() {
    guarded(|| {
        let interface = loopback();
        let too_many =
            |interface: &Interface, direction, which: &str| match inline(interface, direction)
                .build()
            {
                Err(Error::TooManyRings { device, direction, limit }) => {
                    assert_eq!((device.as_str(), direction), (interface.device_name(), which));
                    assert_eq!(limit, 1);
                }
                other => panic!("{other:?}"),
            };
        let reader = inline(&interface, Direction::Both).build().unwrap();
        too_many(&interface, Direction::Read, "reading");
        too_many(&interface, Direction::Both, "reading");
        let writers: Vec<Ring> =
            (0..5).map(|_| inline(&interface, Direction::Write).build().unwrap()).collect();
        drop(writers);
        // A close releases the claim, and so does a drop.
        let mut reader = reader;
        reader.close().unwrap();
        let second = inline(&interface, Direction::Read).build().unwrap();
        too_many(&interface, Direction::Read, "reading");
        drop(second);
        inline(&interface, Direction::Both).build().unwrap();

        let script =
            Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).limits(|_| {}).start();
        assert_eq!(script.capabilities().writing_rings, 1);
        let _writer = inline(&script, Direction::Write).build().unwrap();
        let _reader = inline(&script, Direction::Read).build().unwrap();
        too_many(&script, Direction::Write, "writing");
        too_many(&script, Direction::Read, "reading");
    });
}

/// A failed build releases what it has claimed, so a later build succeeds.
#[test]
fn a_ring_that_could_not_be_built_takes_no_place() {
    guarded(|| {
        every_way(|way, poller| {
            let refuse = Arc::new(AtomicBool::new(true));
            let refusing = refuse.clone();
            let interface = Script::fallible(move |_, _| {
                if refusing.load(Ordering::SeqCst) {
                    return Err(Status::SharingServiceBusy.into());
                }
                Ok(ScriptQueue::new(|_| Ok(Progress::Idle)))
            })
            .limits(|_| {})
            .start();
            for _ in 0..3 {
                let build = interface.ring(Direction::Both).drive(way.drive(poller)).build();
                assert!(matches!(build, Err(Error::Status(Status::SharingServiceBusy))));
            }
            refuse.store(false, Ordering::SeqCst);
            interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
        });
    });
}

#[test]
fn a_pool_serves_several_rings_and_a_frame_read_from_one_is_written_to_the_other() {
    guarded(|| {
        every_way(|way, poller| {
            let (left, right) = (loopback(), loopback());
            let (shared, foreign) = (pool(32), pool(4));
            let build = |interface: &Interface| {
                let builder = interface.ring(Direction::Both).depth(8).pool(&shared);
                builder.pool(&pool(1)).drive(way.drive(poller)).build().unwrap()
            };
            let (mut left, mut right) = (build(&left), build(&right));
            send(&mut left, 42);
            post(&mut left, 1);
            let read =
                reap_n(&mut left, 2).into_iter().find(|done| done.op == RingOp::Read).unwrap();
            let frame = read.frame.unwrap();
            let (slot, address) = (frame.slot(), frame.as_ptr());
            right.submit_write(frame, 2).unwrap();
            post(&mut right, 3);
            for done in reap_n(&mut right, 2) {
                let frame = done.frame.unwrap();
                assert_eq!(number_of(&frame), 42);
                if done.op == RingOp::Write {
                    assert_eq!((frame.slot(), frame.as_ptr()), (slot, address), "without a copy");
                }
            }
            assert_eq!(shared.slots_out(), 0);
            let refusal = left.submit_read(foreign.alloc().unwrap(), 4).unwrap_err();
            assert_eq!(refusal.kind, SubmitErrorKind::ForeignPool);
            assert!(foreign.owns(&refusal.frame));
            assert_eq!(left.pools().len(), 2);
        });
    });
}

#[test]
fn an_interface_says_what_was_negotiated() {
    let mac = MacAddr6::new(2, 1, 2, 3, 4, 5);
    let network = unique("negotiated");
    let builder = || {
        Interface::builder()
            .mode(Mode::Host)
            .interface_id([7; 16])
            .device(Embedded::network(network.clone()))
    };
    let first = builder().mac(mac).mtu(2000).start().unwrap();
    assert_eq!((first.mode(), first.mac(), first.mtu()), (Mode::Host, mac, 2000));
    assert_eq!((first.max_packet_size(), first.interface_id()), (2018, [7; 16]));
    assert_eq!((first.device_name(), first.lease(mac)), ("embedded", None));
    let caps = first.capabilities();
    assert_eq!((caps.mtu, caps.max_packet_size), (2000, 2018));
    assert_eq!((caps.reading_rings, caps.max_read_batch), (1, 200));
    assert!(first.info().ipv4.is_some());
    let ring = inline(&first, Direction::Both).build().unwrap();
    assert_eq!(ring.capabilities(), caps);
    // The same identity gives the same MAC. Interfaces that join a network must agree with its
    // settings.
    let second = builder().mtu(2000).start().unwrap();
    let derived = second.mac();
    assert_ne!(derived, mac);
    drop(second);
    assert_eq!(builder().mtu(2000).start().unwrap().mac(), derived);
    assert!(matches!(builder().mtu(1500).start(), Err(Error::Config(_))), "another MTU");
    assert!(matches!(builder().mac(mac).mtu(2000).start(), Err(Error::Config(_))), "its MAC");
    let bridged = builder().mode(Mode::Bridged("en0".to_owned())).start();
    assert!(matches!(bridged, Err(Error::NotSupported { .. })), "{bridged:?}");
    // Identities are random unless given.
    assert_ne!(loopback().interface_id(), loopback().interface_id());
}

/// Goal: the counters show what happens to a packet on the embedded network: second copies, frames
/// that the gateway could not answer, and every drop, including a packet that a guest sends to
/// itself.
#[test]
fn an_embedded_interface_counts_what_it_drops_copies_and_does_not_answer() {
    guarded(|| {
        let network = unique("counts");
        let port = || Interface::builder().device(quiet_network(network.clone())).start();
        let (near, far) = (port().unwrap(), port().unwrap());
        let (mac, peer) = (near.mac().into_array(), far.mac().into_array());
        let mut ring = inline(&near, Direction::Both).build().unwrap();
        let mut other = inline(&far, Direction::Both).build().unwrap();
        let write = |ring: &mut Ring, bytes: &[u8]| {
            let mut frame = ring.alloc().unwrap();
            frame.copy_from(bytes).unwrap();
            ring.submit_write(frame, 0).unwrap();
            assert!(reap_n(ring, 1)[0].result.is_ok());
        };
        let read = |counts: Vec<(&'static str, u64)>, what: &str| {
            let found = counts.iter().find(|(name, _)| *name == what);
            found.unwrap_or_else(|| panic!("no {what} in {counts:?}")).1
        };
        write(&mut ring, &packet_between(mac, mac, 0, 60));
        assert_eq!(read(near.drops(), "own port"), 1);
        // No read is posted at the receiver, so the packet waits and is copied a second time.
        write(&mut ring, &packet_between(mac, peer, 1, 60));
        post(&mut other, 0);
        assert_eq!(number_of(reap_n(&mut other, 1)[0].frame.as_ref().unwrap()), 1);
        assert_eq!((read(far.counters(), "second copies"), near.counters()[0].1), (1, 0));
        // A truncated ARP packet, and a protocol that the gateway does not know.
        let mut broken = packet_between(mac, [0xff; 6], 2, 30);
        broken[12..14].copy_from_slice(&[8, 6]);
        write(&mut ring, &broken);
        write(&mut ring, &packet_between(mac, [0xff; 6], 3, 60));
        for interface in [&near, &far] {
            assert_eq!(read(interface.counters(), "gateway malformed"), 1);
            assert_eq!(read(interface.counters(), "gateway other protocols"), 1);
            assert_eq!(read(interface.counters(), "gateway ARP replies"), 0);
        }
    });
}

/// Goal: the settings of DHCP reach the network's server, and those that cannot be are refused with
/// a sentence before anything starts.
#[test]
fn an_embedded_interface_takes_the_settings_of_dhcp() {
    let mac = MacAddr6::new(0x52, 0x54, 0, 0, 0, 1);
    let host = |last| Ipv4Addr::new(192, 168, 64, last);
    let network = unique("dhcp-settings");
    let file = std::env::temp_dir().join(format!("{network}-{}.leases", std::process::id()));
    let start = |change: fn(Embedded) -> Embedded| {
        let driver = change(Embedded::network(network.clone())).lease_file(&file);
        Interface::builder().device(driver).start()
    };
    let refused = |change: fn(Embedded) -> Embedded| match start(change) {
        Err(Error::Config(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let before = refused(|driver| {
        driver.dhcp_range(Ipv4Addr::new(192, 168, 64, 20), Ipv4Addr::new(192, 168, 64, 10))
    });
    assert!(before.contains("cannot begin at 192.168.64.20"), "{before}");
    let beyond = refused(|driver| driver.reserve(MacAddr6::nil(), Ipv4Addr::new(10, 0, 0, 1)));
    assert!(beyond.contains("10.0.0.1 is not an address"), "{beyond}");
    let short = refused(|driver| driver.lease_time(Duration::from_secs(9)));
    assert!(short.contains("lease_time of 9s"), "{short}");
    let interface = start(|driver| {
        driver
            .dhcp_range(Ipv4Addr::new(192, 168, 64, 20), Ipv4Addr::new(192, 168, 64, 29))
            .reserve(MacAddr6::new(0x52, 0x54, 0, 0, 0, 1), Ipv4Addr::new(192, 168, 64, 9))
            .lease_time(Duration::from_secs(600))
    })
    .unwrap();
    // The reserved address is the client's first choice. A client that renews it without a record
    // has a lease at once.
    let mut ring = inline(&interface, Direction::Both).build().unwrap();
    let mut write = |frame: &[u8]| {
        let mut packet = ring.alloc().unwrap();
        packet.copy_from(frame).unwrap();
        ring.submit_write(packet, 0).unwrap();
        assert!(reap_n(&mut ring, 1)[0].result.is_ok());
    };
    write(&dhcp_renewal(mac, host(9)));
    let lease = interface.lease(mac).expect("a lease");
    assert_eq!((lease.address, lease.duration.as_secs()), (host(9), 600));
    let other = MacAddr6::new(0x52, 0x54, 0, 0, 0, 2);
    for (address, given) in [(host(9), false), (host(30), false), (host(29), true)] {
        write(&dhcp_renewal(other, address));
        assert_eq!(interface.lease(other).is_some(), given, "{address}");
    }
    drop((ring, interface));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.contains("52:54:00:00:00:01 192.168.64.9 "), "{text}");
}

/// The broadcast request of a client that renews its address.
fn dhcp_renewal(mac: MacAddr6, address: Ipv4Addr) -> Vec<u8> {
    let mut message = vec![0; 300];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[12..16].copy_from_slice(&address.octets());
    message[28..34].copy_from_slice(mac.as_bytes());
    message[236..244].copy_from_slice(&[99, 130, 83, 99, 53, 1, 3, 255]);
    let udp_len = 8 + message.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    ip[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
    ip.extend(address.octets());
    ip.extend([255; 4]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let udp = [[0, 68], [0, 67], udp_len.to_be_bytes(), [0, 0]].concat();
    [&[0xff; 6][..], mac.as_bytes(), &[8, 0], &ip, &udp, &message].concat()
}

/// Goal: a network ends when its last interface stops, even if the interface's handle still exists.
/// Its name is then free. A restart keeps the network and its interfaces.
#[test]
fn a_network_lives_as_long_as_an_interface_is_on_it() {
    guarded(|| {
        let network = unique("lives");
        let port =
            |mtu| Interface::builder().mtu(mtu).device(Embedded::network(network.clone())).start();
        let (first, second) = (port(1500).unwrap(), port(1500).unwrap());
        let ring = first.ring(Direction::Both).build().unwrap();
        first.stop(LONG).unwrap();
        assert!(matches!(port(2000), Err(Error::Config(_))), "the second is still there");
        second.restart(LONG).unwrap();
        assert!(matches!(port(2000), Err(Error::Config(_))), "the second has come back");
        second.stop(LONG).unwrap();
        assert_eq!((first.drops(), second.counters()), (Vec::new(), Vec::new()));
        assert_eq!(second.lease(second.mac()), None);
        let third = port(2000).unwrap();
        assert_eq!(third.mtu(), 2000);
        drop(ring);
        drop((first, second, third));
        port(1500).unwrap();
    });
}

#[test]
fn what_a_device_lacks_answers_not_supported() {
    let rule = PortForward {
        protocol: Protocol::Tcp,
        external_port: 8080,
        internal_address: [192, 168, 64, 2].into(),
        internal_port: 80,
    };
    let embedded = Embedded::network(unique("lacks")).no_nat();
    let embedded = Interface::builder().device(embedded).start().unwrap();
    let faulty = vmring::device::fault::Faults::seeded(1).wrap(Loopback::new(1500));
    let faulty = Interface::builder().device(faulty).start().unwrap();
    for interface in [loopback(), embedded, faulty] {
        let name = interface.device_name().to_owned();
        let answers = [
            interface.add_port_forward(&rule).unwrap_err(),
            interface.remove_port_forward(Protocol::Tcp, 8080).unwrap_err(),
            interface.port_forwards().unwrap_err(),
            interface.shared_interfaces().unwrap_err(),
        ];
        for error in answers {
            assert!(matches!(&error, Error::NotSupported { device, .. } if *device == name));
            assert!(error.to_string().contains("not supported"), "{error}");
        }
    }
}
