//! Offloads, mergeable buffers, and guests that take less than the interface gives.

use std::sync::atomic::{AtomicBool, Ordering};

use vmring::config::Offloads;
use vmring::software::complete_checksum;
use vmring::{Checksum, Gso, Interface, OffloadHeader};
use vmring_virtio::net::{Features, NetSettings, QueueSetup};

use crate::driver::shapes::Shape;
use crate::net::basics::{one_buffer, shape};
use crate::net::guest::{Guest, HEADER, Options, driver, layout, poll_both, quiet_network};
use crate::net::wire::{offloading, wire};
use crate::support::{LONG, guarded};

/// All work that a guest may accept undone.
const UNDONE: Features = Features::GUEST_OFFLOADS;

/// A TCP segment over IPv4 with this many bytes of payload, and a checksum of the pseudo header only.
fn tcp(payload: usize) -> Vec<u8> {
    let mut packet = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let total = (40 + payload) as u16;
    packet.extend([0x45, 0]);
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = ones(&packet[14..34]);
    packet[24..26].copy_from_slice(&(!sum).to_be_bytes());
    packet.extend([0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 5 << 4, 0x10, 0xff, 0xff]);
    let pseudo = [&packet[26..34], &[0, 6], &((20 + payload) as u16).to_be_bytes()].concat();
    packet.extend(ones(&pseudo).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend((0..payload).map(|at| (at * 7 + at / 256) as u8));
    packet
}

/// The ones' complement sum (RFC 1071).
fn ones(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the checksum of a TCP segment over IPv4 is complete.
fn is_complete(packet: &[u8]) -> bool {
    let len = (packet.len() - 34) as u16;
    let pseudo = [&packet[26..34], &[0, 6], &len.to_be_bytes()].concat();
    let sum = u32::from(ones(&pseudo)) + u32::from(ones(&packet[34..]));
    matches!(sum, 0xffff | 0x1fffe)
}

const PARTIAL: OffloadHeader =
    OffloadHeader { checksum: Checksum::Partial { start: 34, offset: 16 }, ..OffloadHeader::NONE };

fn tso(segment_size: u16) -> OffloadHeader {
    OffloadHeader { gso: Gso::TcpV4, segment_size, header_len: 54, ..PARTIAL }
}

fn bytes_of(header: OffloadHeader) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    header.write(&mut bytes);
    bytes
}

fn guests(without: [Features; 2], change: fn(&mut vmring::device::Capabilities)) -> [Guest; 2] {
    let (interfaces, _) = wire(change);
    let mut without = without.into_iter();
    interfaces.map(|interface| {
        let without = without.next().unwrap() | Features::EVENT_IDX;
        Guest::with(interface, &Options { without, ..Options::default() })
    })
}

#[test]
fn what_is_offered_is_what_the_interface_does() {
    let [a, _] = guests([Features::NONE; 2], offloading);
    let offered = a.device.features();
    let all = Features::CSUM
        | Features::GUEST_CSUM
        | Features::HOST_TSO4
        | Features::HOST_TSO6
        | Features::HOST_ECN
        | Features::HOST_USO
        | UNDONE.without(Features::GUEST_UFO);
    assert!(offered.has(all), "{:#x}", offered.bits());
    assert!(!offered.has(Features::HOST_UFO) && !offered.has(Features::GUEST_UFO), "IP fragments");
    let [b, _] = guests([Features::NONE; 2], |caps| {
        offloading(caps);
        (caps.offloads.tso6, caps.offloads.uso) = (false, false);
    });
    let offered = b.device.features();
    assert!(offered.has(Features::HOST_TSO4 | Features::GUEST_TSO4 | Features::HOST_ECN));
    for not in [Features::HOST_TSO6, Features::GUEST_TSO6, Features::HOST_USO, Features::GUEST_USO4]
    {
        assert!(!offered.has(not));
    }
}

#[test]
fn features_without_their_conditions_are_not_believed() {
    let (interfaces, _) = wire(offloading);
    let [interface, _] = interfaces;
    let interrupts = std::sync::Arc::new(crate::net::guest::Interrupts::default());
    let mut device =
        vmring_virtio::net::NetDevice::new(interface, interrupts, NetSettings::default()).unwrap();
    let accepted = device.features().without(Features::CSUM | Features::GUEST_CSUM);
    device.set_features(accepted).unwrap();
    let accepted = device.accepted_features();
    for gone in [Features::HOST_TSO4, Features::HOST_ECN, Features::HOST_USO, Features::GUEST_TSO6]
    {
        assert!(!accepted.has(gone));
    }
    assert!(accepted.has(Features::VERSION_1 | Features::MRG_RXBUF));
}

#[test]
fn a_large_packet_goes_as_it_is_between_guests_that_take_it() {
    let [mut a, mut b] = guests([Features::NONE, Features::MRG_RXBUF], offloading);
    assert!(b.post(&shape("Linux, big packets")) && b.post(&one_buffer(65562)));
    b.poll();
    let packet = tcp(60_000);
    let header = bytes_of(tso(1448));
    for split in [&[12 + 54, 4096, 4096, 4096][..], &[u32::MAX]] {
        assert!(a.send_raw(&header, &packet, split, Some(0)));
    }
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    assert_eq!(returned.len(), 2);
    for (len, bytes) in returned {
        assert_eq!(len as usize, HEADER + packet.len());
        assert_eq!(bytes[..10], header[..10]);
        assert_eq!(bytes[10..HEADER], [1, 0], "one buffer");
        assert_eq!(bytes[HEADER..], packet);
    }
    assert_eq!((a.stats().tx_copied, b.stats().rx_software), (0, 0));
}

#[test]
fn work_that_was_not_accepted_is_not_asked_for() {
    let no_ecn = Features::HOST_ECN | Features::HOST_TSO6;
    let [mut a, mut b] = guests([no_ecn, Features::MRG_RXBUF], offloading);
    b.fill(&one_buffer(65562), 4);
    b.poll();
    let packet = tcp(4000);
    let ecn = OffloadHeader { ecn: true, ..tso(1448) };
    let v6 = OffloadHeader { gso: Gso::TcpV6, ..tso(1448) };
    let ufo = OffloadHeader {
        gso: Gso::Udp,
        checksum: Checksum::Partial { start: 34, offset: 6 },
        ..tso(1448)
    };
    // What the header says is not in the packet.
    let past = OffloadHeader { checksum: Checksum::Partial { start: 9000, offset: 16 }, ..PARTIAL };
    for bad in [ecn, v6, ufo, past] {
        a.send_raw(&bytes_of(bad), &packet, &[u32::MAX], None);
    }
    a.send_raw(&bytes_of(tso(1448)), &packet, &[u32::MAX], None);
    poll_both(&mut a, &mut b);
    assert_eq!((a.stats().tx_bad_header, b.returned().len()), (4, 1));
}

/// Firmware accepts no offloads. The system on the other side has sent with them.
#[test]
fn a_guest_without_offloads_gets_complete_packets() {
    for merging in [false, true] {
        let without = UNDONE.with_if(!merging, Features::MRG_RXBUF);
        let [mut a, mut b] = guests([Features::NONE, without], offloading);
        assert_eq!(b.fill(&one_buffer(1526), 60), 60);
        b.poll();
        // A checksum to complete, a packet to cut, and one with nothing to do.
        a.send_raw(&bytes_of(PARTIAL), &tcp(1000), &[u32::MAX], None);
        a.send_raw(&bytes_of(tso(1000)), &tcp(30_500), &[u32::MAX], None);
        let plain = a.frame_to(b.mac(), 700, 1);
        a.send(&plain);
        for _ in 0..3 {
            poll_both(&mut a, &mut b);
        }
        let packets = b.received();
        assert_eq!(packets.len(), 1 + 31 + 1);
        let (last, cut) = packets.split_last().unwrap();
        assert_eq!(*last, plain);
        let mut payload: Vec<u8> = Vec::new();
        for packet in cut {
            assert!(is_complete(packet), "{}", packet.len());
            payload.extend(&packet[54..]);
        }
        assert_eq!(payload, [&tcp(1000)[54..], &tcp(30_500)[54..]].concat());
        assert_eq!((b.stats().rx_software, b.stats().rx_packets), (2, 33));
    }
}

/// A guest that completes no segments but checksums gets segments with partial ones.
#[test]
fn a_guest_that_takes_checksums_gets_partial_ones() {
    let without = UNDONE.without(Features::GUEST_CSUM);
    let [mut a, mut b] = guests([Features::NONE, without], offloading);
    b.fill(&one_buffer(1526), 8);
    b.poll();
    a.send_raw(&bytes_of(tso(1000)), &tcp(2000), &[u32::MAX], None);
    a.send_raw(&bytes_of(PARTIAL), &tcp(100), &[u32::MAX], None);
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    assert_eq!(returned.len(), 3);
    for (_, mut bytes) in returned {
        assert_eq!(bytes[..HEADER], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0]);
        complete_checksum(&PARTIAL, &mut bytes[HEADER..]).unwrap();
        assert!(is_complete(&bytes[HEADER..]));
    }
}

#[test]
fn packets_that_cannot_be_cut_are_counted_and_the_queue_goes_on() {
    let (interfaces, control) = wire(offloading);
    let [_, interface] = interfaces;
    let options = Options { without: UNDONE | Features::EVENT_IDX, ..Options::default() };
    let mut b = Guest::with(interface, &options);
    b.fill(&one_buffer(1526), 8);
    b.poll();
    // A header of TCP before a packet that is none, an unknown type, and a good packet.
    control.inject(1, bytes_of(tso(1000)), vec![0; 3000]);
    control.inject(1, [0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], vec![0; 100]);
    control.inject(1, bytes_of(PARTIAL), tcp(100));
    b.poll();
    b.poll();
    assert_eq!((b.stats().rx_malformed, b.received().len()), (2, 1));
}

/// One packet over several mergeable buffers, with the interface that merges and with one that does
/// not. Whoever does it, the guest sees the same.
#[test]
fn a_packet_is_spread_over_mergeable_buffers() {
    let ways: [fn(&mut vmring::device::Capabilities); 2] = [
        |caps| {
            caps.max_packet_size = 65550;
            (caps.read_segments, caps.write_segments) = (256, 256);
            caps.merges_reads = true;
        },
        |caps| caps.max_packet_size = 65550,
    ];
    for (way, change) in ways.into_iter().enumerate() {
        let [mut a, mut b] = guests([Features::NONE; 2], change);
        // The buffers of one packet may differ.
        for len in [1536, 100, 12, 4096, 1536, 1536] {
            b.post(&one_buffer(len));
        }
        b.post(&shape("netkvm, header apart"));
        b.fill(&one_buffer(1536), 100);
        b.poll();
        for (number, len) in [60, 1524, 1525, 1624, 9000, 60_000].into_iter().enumerate() {
            let packet = a.frame_to(b.mac(), len, number as u32);
            assert!(a.send_in(&packet, &[u32::MAX], None));
            let before = b.interrupts.of(0);
            poll_both(&mut a, &mut b);
            poll_both(&mut a, &mut b);
            let returned = b.returned();
            let (first, rest) = returned.split_first().expect("it arrives");
            let count = u16::from_le_bytes(first.1[10..12].try_into().unwrap());
            assert_eq!(usize::from(count), returned.len(), "{way} {len}");
            assert_eq!(first.1[..10], [0; 10]);
            let mut bytes = first.1[HEADER..].to_vec();
            for (used, part) in rest {
                assert_eq!(*used as usize, part.len());
                bytes.extend(part);
            }
            assert_eq!(bytes, packet, "{way} {len}");
            assert_eq!(b.interrupts.of(0), before + 1, "the parts come together");
        }
        assert_eq!((b.stats().rx_packets, b.stats().rx_too_small), (6, 0), "{way}");
        assert_eq!(b.stats().rx_copied, [0, 6][way], "only what the interface cannot spread");
    }
}

/// A packet for which the guest has too few buffers waits, and the device sleeps meanwhile.
#[test]
fn too_few_mergeable_buffers_are_waited_for() {
    for without in [Features::EVENT_IDX, Features::NONE] {
        let (interfaces, _) = wire(|caps| caps.max_packet_size = 65550);
        let [mut a, mut b] = interfaces
            .map(|interface| Guest::with(interface, &Options { without, ..Options::default() }));
        b.fill(&one_buffer(1536), 3);
        poll_both(&mut a, &mut b);
        let packet = a.frame_to(b.mac(), 9000, 1);
        a.send(&packet);
        poll_both(&mut a, &mut b);
        assert_eq!(b.returned().len(), 0);
        for _ in 0..3 {
            assert!(b.device.arm(), "it waits for buffers, {without:?}");
            b.rx.needs_kick();
            b.fill(&one_buffer(1536), 1);
            assert!(b.rx.needs_kick(), "and is told of them, {without:?}");
            assert!(!b.device.arm());
            b.poll();
        }
        let returned = b.returned();
        assert_eq!(returned.len(), 6);
        assert_eq!(returned[0].1[10..12], [6, 0]);
        let bytes: Vec<u8> = returned.into_iter().flat_map(|one| one.1).collect();
        assert_eq!(bytes[HEADER..], packet);
    }
}

#[test]
fn a_guest_without_mergeable_buffers_loses_what_does_not_fit_when_it_is_cut() {
    let [mut a, mut b] = guests([Features::NONE, UNDONE | Features::MRG_RXBUF], offloading);
    for len in [12 + 500, 1526, 11, 1526, 1526] {
        b.post(&one_buffer(len));
    }
    b.poll();
    a.send_raw(&bytes_of(tso(1000)), &tcp(4000), &[u32::MAX], None);
    poll_both(&mut a, &mut b);
    let lens: Vec<_> = b.returned().iter().map(|one| one.0).collect();
    assert_eq!(lens, [0, 1066, 0, 1066, 1066]);
    assert_eq!((b.stats().rx_too_small, b.stats().rx_useless), (1, 1));
}

/// Linux switches offloads off for XDP, and on again.
#[test]
fn offloads_are_switched_while_packets_arrive() {
    let (interfaces, control) = wire(offloading);
    let [_, interface] = interfaces;
    let mut options =
        Options { without: Features::EVENT_IDX | Features::MRG_RXBUF, ..Options::default() };
    options.settings.control_queue = true;
    let mut guest = Guest::with(interface, &options);
    let accepted = guest.device.accepted_features();
    let mut commands = driver(&guest.memory, 2, 16, accepted, 0).with_arena(0x4070_0000);
    guest.device.start_queue(2, QueueSetup::new(layout(2, 16))).unwrap();
    let big = Shape { name: "64 KiB", buffers: vec![(65562, true)], indirect: None };
    guest.fill(&big, 40);
    guest.poll();
    let on = accepted.bits() & UNDONE.bits();
    for (bits, answer, count) in [(0, 0, 3), (on, 0, 1), (0, 0, 3), (1 << 10, 1, 3), (on, 0, 1)] {
        let head = commands.post(&[(10, false), (1, true)], None).unwrap();
        let buffers = commands.buffers(head).to_vec();
        commands.write(buffers[0].address, &[&[5, 0][..], &u64::to_le_bytes(bits)].concat());
        commands.expose();
        guest.poll();
        assert_eq!(commands.read(buffers[1].address, 1), [answer]);
        assert_eq!(commands.collect().len(), 1);
        guest.poll();
        control.inject(1, bytes_of(tso(1000)), tcp(3000));
        guest.poll();
        guest.poll();
        assert_eq!(guest.returned().len(), count, "{bits:#x}");
        assert_eq!(control.waiting(1), 0);
    }
    assert_eq!(guest.stats().rx_errors, 0);
}

/// Two guests on an embedded network whose ports have every offload. The first one leaves everything to
/// others, and the second one does not accept `without`.
fn on_a_network(name: &str, without: Features, control: bool) -> [Guest; 2] {
    [Features::NONE, without].map(|without| {
        let embedded = quiet_network(name).overflow(256);
        let interface = Interface::builder().device(embedded).offloads(Offloads::ALL).start();
        let mut options = Options { without: without | Features::EVENT_IDX, ..Options::default() };
        options.settings.control_queue = control;
        Guest::with(interface.expect("an interface"), &options)
    })
}

/// A TCP packet from one guest to another.
fn tcp_to(from: &Guest, to: &Guest, payload: usize) -> Vec<u8> {
    let mut packet = tcp(payload);
    packet[..6].copy_from_slice(&to.mac());
    packet[6..12].copy_from_slice(&from.mac());
    packet
}

fn counter(guest: &Guest, name: &str) -> u64 {
    let counters = guest.device.interface().counters();
    counters.into_iter().find(|(known, _)| *known == name).expect("it is counted").1
}

/// The sender completes and cuts into the guest's own buffers, so nothing is copied twice, and the
/// buffers need be no larger than a frame.
#[test]
fn a_network_does_what_a_guest_does_not_accept_without_a_copy() {
    for merging in [false, true] {
        let without = UNDONE.with_if(!merging, Features::MRG_RXBUF);
        let [mut a, mut b] = on_a_network(&format!("no copies {merging}"), without, false);
        assert_eq!(b.fill(&one_buffer(1530), 120), 120);
        b.poll();
        a.send_raw(&bytes_of(PARTIAL), &tcp_to(&a, &b, 1000), &[u32::MAX], None);
        let long = tcp_to(&a, &b, 64_000);
        a.send_raw(&bytes_of(tso(1000)), &long, &[u32::MAX], None);
        let plain = a.frame_to(b.mac(), 700, 1);
        a.send(&plain);
        poll_both(&mut a, &mut b);
        let packets = b.received();
        assert_eq!(packets.len(), 1 + 64 + 1);
        let (last, cut) = packets.split_last().unwrap();
        assert_eq!(*last, plain);
        let mut payload: Vec<u8> = Vec::new();
        for packet in cut {
            assert!(is_complete(packet), "{}", packet.len());
            payload.extend(&packet[54..]);
        }
        assert_eq!(payload, [&tcp(1000)[54..], &tcp(64_000)[54..]].concat());
        let copied = (a.stats().tx_copied, b.stats().rx_software);
        let bounced = b.device.ring_stats(0).expect("a ring").bounced_reads;
        assert_eq!((copied, bounced), ((0, 0), 0));
        let counters = ["second copies", "checksums completed", "cut in software"]
            .map(|name| counter(&a, name));
        assert_eq!(counters, [0, 1, 1]);
    }
}

/// What a guest has not accepted of TCP alone: ECN, or one of the protocols.
#[test]
fn a_network_leaves_a_guest_what_it_accepts() {
    let without = Features::GUEST_ECN | Features::MRG_RXBUF;
    let [mut a, mut b] = on_a_network("no ECN", without, false);
    b.fill(&one_buffer(65_565), 8);
    b.poll();
    let packet = tcp_to(&a, &b, 3000);
    let ecn = OffloadHeader { ecn: true, ..tso(1000) };
    for header in [tso(1000), ecn] {
        a.send_raw(&bytes_of(header), &packet, &[u32::MAX], None);
    }
    poll_both(&mut a, &mut b);
    let returned = b.returned();
    assert_eq!(returned.len(), 1 + 3);
    assert_eq!(returned[0].1[..10], bytes_of(tso(1000))[..10]);
    for (_, bytes) in &returned[1..] {
        assert_eq!(bytes[..HEADER], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0], "partial checksums");
    }
    assert_eq!((b.stats().rx_software, counter(&a, "cut in software")), (0, 1));
}

/// Sets a flag when it is dropped, also by a panic, so that a thread ends that looks at it.
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A guest switches its offloads while another one sends as fast as it can. After the answer nothing
/// arrives that it does not accept any more.
#[test]
fn offloads_are_switched_while_another_guest_sends() {
    guarded("switched offloads", || {
        let [mut a, mut b] = on_a_network("switched offloads", Features::MRG_RXBUF, true);
        let accepted = b.device.accepted_features();
        let mut commands = driver(&b.memory, 2, 16, accepted, 0).with_arena(0x4070_0000);
        b.device.start_queue(2, QueueSetup::new(layout(2, 16))).unwrap();
        let packet = tcp_to(&a, &b, 5000);
        let done = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ends = SetAtEnd(done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    a.send_raw(&bytes_of(tso(1000)), &packet, &[u32::MAX], None);
                    a.poll();
                    a.tx.collect();
                }
            });
            let on = accepted.bits() & UNDONE.bits();
            let checksums = Features::GUEST_CSUM.bits();
            for (round, bits) in [0, on, checksums, on, 0].into_iter().cycle().take(40).enumerate()
            {
                let head = commands.post(&[(10, false), (1, true)], None).unwrap();
                let buffers = commands.buffers(head).to_vec();
                let command = [&[5, 0][..], &u64::to_le_bytes(bits)].concat();
                commands.write(buffers[0].address, &command);
                commands.expose();
                let began = std::time::Instant::now();
                // The answer waits until no packet is under way to the buffers of before.
                while commands.collect().is_empty() {
                    assert!(began.elapsed() < LONG, "round {round}: no answer, {:?}", b.device);
                    b.poll();
                }
                assert_eq!(commands.read(buffers[1].address, 1), [0]);
                // What was put into the queue before the answer.
                b.returned();
                let mut came = 0;
                let began = std::time::Instant::now();
                while came < 12 {
                    assert!(began.elapsed() < LONG, "round {round}: {:?}", b.device);
                    b.fill(&one_buffer(5100), 16);
                    b.poll();
                    for (len, bytes) in b.returned() {
                        let is_whole = len as usize == HEADER + 54 + 5000;
                        let kind = (bytes[0], bytes[1]);
                        let (wanted, may_come) = match bits {
                            0 => ((0, 0), kind == (0, 0)),
                            _ if bits == on => ((1, 1), is_whole == (kind == (1, 1))),
                            _ => ((1, 0), kind.1 == 0),
                        };
                        assert!(may_come, "round {round}: {kind:?}");
                        if kind == (0, 0) {
                            assert!(is_complete(&bytes[HEADER..]), "round {round}");
                        }
                        // What has waited may leave less.
                        came += u32::from(kind == wanted);
                    }
                }
            }
        });
        assert_eq!((b.stats().rx_software, b.stats().rx_errors), (0, 0));
    });
}
