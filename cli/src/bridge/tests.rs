use super::*;
use crate::dhcp::DhcpArgs;
use crate::nat::NatArgs;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::{self, JoinHandle};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket,
    TcpRepr, TcpSeqNumber, UdpPacket,
};
use vmring::device::{
    Capabilities, Device, Offloads, PollContext, PostedSlot, Progress, Queue, QueueConfig,
    Wake as DeviceWake,
};
use vmring::{
    Checksum, Direction, Drive, Driver, Embedded, Error, Gso, Interface, InterfaceConfig,
    InterfaceInfo, Ipv4Range, MacAddr6, OFFLOAD_LEN, OffloadHeader, Status,
};

use super::limits::END_TIMEOUT;
use super::spec::End;
use crate::demo::guest::{Command, Guest, Lease, Report};
use crate::demo::nic::NetworkCard;
use crate::device::{QUEUE, VMNET};
use crate::stream::Stream;
use crate::vmnet::VmnetSpec;

/// No step takes a hundredth of this.
const LONG: Duration = Duration::from_secs(60);

/// A bridge that works on a thread of its own.
struct Running {
    stop: Stop,
    thread: JoinHandle<(Summary, Result<(), Failure>)>,
}

impl Running {
    fn start(ends: [End; 2], software: bool, depth: u32) -> Self {
        let work = if software { InSoftware::CutAndMerge } else { InSoftware::Nothing };
        Self::with(ends, work, depth)
    }

    fn with(ends: [End; 2], work: InSoftware, depth: u32) -> Self {
        Self::ending_within(END_TIMEOUT, ends, work, depth)
    }

    /// A bridge that drops what an end does not take within this time.
    fn ending_within(time: Duration, ends: [End; 2], work: InSoftware, depth: u32) -> Self {
        let (tell, told) = channel();
        let thread = thread::spawn(move || {
            let stop = Stop::new().unwrap();
            tell.send(stop.clone()).unwrap();
            let mut bridge = Bridge::new(ends, [work; 2], [depth; 2]).unwrap();
            let start = Instant::now();
            let moving = bridge.run(&stop, None, None, |_| {});
            let ended = bridge.end_within(time);
            let summary = Summary::of(&bridge, start.elapsed(), Duration::ZERO);
            (summary, moving.and(ended).and_then(|()| bridge.stop()))
        });
        Self { stop: told.recv().unwrap(), thread }
    }

    fn end(self) -> Summary {
        self.stop.tell();
        let (summary, outcome) = self.thread.join().unwrap();
        outcome.unwrap();
        summary
    }
}

/// Networks as they are without an option.
fn defaults() -> NetworkArgs<'static> {
    static DHCP: LazyLock<DhcpArgs> = LazyLock::new(DhcpArgs::default);
    static NAT: LazyLock<NatArgs> = LazyLock::new(NatArgs::default);
    NetworkArgs { dhcp: &DHCP, nat: &NAT }
}

/// A guest on a network, and its reports.
struct GuestSide {
    guest: Guest,
    reports: Receiver<(usize, Report)>,
    _interface: Interface,
}

impl GuestSide {
    fn join(network: &str, subnet: &str) -> Self {
        let range: Ipv4Range = subnet.parse().unwrap();
        let driver = Embedded::network(network).overflow(QUEUE);
        let interface = Interface::builder().ipv4(range).device(driver).start().unwrap();
        let ring = interface.ring(Direction::Both).build().unwrap();
        let control = ring.control();
        let (tell, reports) = channel();
        let nic = NetworkCard::new(ring, 256, 256, false);
        let guest = Guest::start(0, interface.mac(), nic, control, tell).unwrap();
        Self { guest, reports, _interface: interface }
    }

    fn next(&self) -> Report {
        match self.reports.recv_timeout(LONG).expect("a report in time").1 {
            Report::Failed(why) => panic!("{why}"),
            report => report,
        }
    }

    fn lease(&self) -> Lease {
        match self.next() {
            Report::Leased(lease) => lease,
            report => panic!("{report:?} instead of an address"),
        }
    }
}

fn spec(text: &str) -> Spec {
    text.parse().unwrap()
}

/// Two networks with a guest each. Transfers `bytes` from one guest to the other over the bridge.
fn transfer(name: &str, bytes: u64, depth: u32) -> (Summary, Duration) {
    let networks = [format!("{name} one"), format!("{name} two")];
    let subnets = ["192.168.64.1/24", "192.168.64.100/24"];
    let specs = [0, 1].map(|i| spec(&format!("embedded:{},{}", networks[i], subnets[i])));
    let ends =
        spec::start([&specs[0], &specs[1]], Offload::Common, None, None, defaults()).unwrap();
    let sides = [0, 1].map(|i| GuestSide::join(&networks[i], subnets[i]));
    let leases = sides.each_ref().map(GuestSide::lease);
    let addresses = leases.map(|lease| lease.address.address());
    assert_ne!(addresses[0], addresses[1]);
    let running = Running::start(ends, false, depth);
    for (from, to) in [(0, 1), (1, 0)] {
        // The other guest, and the gateway of its network.
        for target in [addresses[to], leases[to].server] {
            sides[from].guest.tell(Command::Ping { target, count: 5 });
            match sides[from].next() {
                Report::Pinged(pings) => assert_eq!(pings.round_trips.len(), 5, "{target}"),
                report => panic!("{report:?} instead of pings"),
            }
        }
    }
    let window = 256 << 10;
    let stream = Stream::new(bytes);
    sides[1].guest.tell(Command::Receive { window, from: None });
    assert!(matches!(sides[1].next(), Report::Listening));
    let start = Instant::now();
    let (target, sent) = (addresses[1], stream.clone());
    sides[0].guest.tell(Command::Send { target, bytes, stream: sent, window });
    let Report::Received(received) = sides[1].next() else { panic!("nothing came") };
    let time = received.finished - start;
    let digest = stream.digest(bytes, || Ok::<_, ()>(())).unwrap();
    assert_eq!((received.bytes, received.digest), (bytes, digest));
    assert!(matches!(sides[0].next(), Report::Sent { .. }));
    let summary = running.end();
    for side in sides {
        assert!(side.guest.quit(LONG));
    }
    (summary, time)
}

#[test]
fn guests_of_two_networks_meet_over_the_bridge() {
    let (summary, _) = transfer("meet", 4 << 20, 256);
    let [there, back] = &summary.directions;
    assert_eq!(summary.ends[0].name, "embedded:meet one");
    for direction in [there, back] {
        assert_eq!(
            (direction.drops, direction.packets_cut, direction.checksums_completed),
            (0, 0, 0),
            "{direction:?}"
        );
        assert_eq!(direction.packets_written, direction.packets_read);
        assert_eq!(direction.bytes_written, direction.bytes_read);
    }
    assert!(there.packets_written > (4 << 20) / 1500 && there.bytes_written > 4 << 20);
    assert!(back.packets_written > 20);
    assert!(there.read_batches.mean >= 1.0 && there.write_batches.mean >= 1.0);
}

/// A wire whose far end the test controls.
#[derive(Clone, Default)]
struct Wire {
    offloads: Offloads,
    /// With `None`, as long as an MTU of 1,500 allows.
    max_packet_size: Option<u32>,
    /// Whether it signals packets by a descriptor instead of a call.
    has_descriptor: bool,
    state: Arc<Mutex<Far>>,
}

#[derive(Default)]
struct Far {
    /// Packets to be read.
    incoming: VecDeque<(OffloadHeader, Vec<u8>)>,
    read: usize,
    /// Packets that were written.
    written: Vec<(OffloadHeader, Vec<u8>)>,
    behaviour: Behaviour,
    wake: Option<DeviceWake>,
    /// The far end of the descriptor.
    signal: Option<UnixStream>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Behaviour {
    #[default]
    Takes,
    /// Keeps the slots that it is given.
    Keeps,
    Refuses,
    Dies,
}

impl Wire {
    fn with(offloads: Offloads) -> Self {
        Self { offloads, ..Self::default() }
    }

    fn holding(self, packets: impl IntoIterator<Item = (OffloadHeader, Vec<u8>)>) -> Self {
        self.state.lock().unwrap().incoming.extend(packets);
        self
    }

    fn that(self, behaviour: Behaviour) -> Self {
        self.becomes(behaviour);
        self
    }

    fn becomes(&self, behaviour: Behaviour) {
        let mut far = self.state.lock().unwrap();
        far.behaviour = behaviour;
        if let Some(mut signal) = far.signal.as_ref() {
            return signal.write_all(&[1]).unwrap();
        }
        let wake = far.wake.clone();
        drop(far);
        if let Some(wake) = wake {
            wake.wake();
        }
    }

    fn end(&self, name: &str) -> End {
        let builder = Interface::builder().device(self.clone()).offloads(self.offloads);
        End::of(name, builder.start().unwrap())
    }

    fn read(&self) -> usize {
        self.state.lock().unwrap().read
    }

    fn written(&self) -> Vec<(OffloadHeader, Vec<u8>)> {
        self.state.lock().unwrap().written.clone()
    }
}

impl Driver for Wire {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        assert_eq!(config.offloads, self.offloads);
        Ok(Arc::new(WireDevice {
            info: InterfaceInfo::new(
                config,
                MacAddr6::new(2, 0, 0, 0, 0, 1),
                1500,
                self.max_packet_size.unwrap_or(1514),
            ),
            wire: *self,
        }))
    }
}

struct WireDevice {
    info: InterfaceInfo,
    wire: Wire,
}

impl Device for WireDevice {
    fn name(&self) -> &str {
        "wire"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.info.mtu, self.info.max_packet_size);
        caps.offloads = self.wire.offloads;
        caps.headroom = if caps.offloads.virtio_header { OFFLOAD_LEN as u32 } else { 0 };
        caps
    }

    fn queue(&self, _: QueueConfig, wake: DeviceWake) -> Result<Box<dyn Queue>, Error> {
        let mut far = self.wire.state.lock().unwrap();
        far.wake = Some(wake);
        let mut near = None;
        if self.wire.has_descriptor {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            (near, far.signal) = (Some(ours), Some(theirs));
        }
        Ok(Box::new(WireQueue { wire: self.wire.clone(), kept: Vec::new(), near }))
    }
}

struct WireQueue {
    wire: Wire,
    kept: Vec<PostedSlot>,
    near: Option<UnixStream>,
}

impl Queue for WireQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let header_len = if self.wire.offloads.virtio_header { OFFLOAD_LEN } else { 0 };
        if let Some(near) = &mut self.near {
            while near.read(&mut [0; 8]).is_ok_and(|n| n > 0) {}
        }
        let mut far = self.wire.state.lock().unwrap();
        if far.behaviour == Behaviour::Dies {
            return Err(Status::Failure);
        }
        while cx.reads() > 0 && !far.incoming.is_empty() {
            let (header, packet) = far.incoming.pop_front().unwrap();
            let mut slot = cx.take_read().unwrap();
            if far.behaviour == Behaviour::Refuses {
                cx.fail(slot, Status::PacketTooBig);
                continue;
            }
            let room = slot.buffer_with_header_mut(header_len).unwrap();
            if let Some(bytes) = room.first_chunk_mut().filter(|_| header_len > 0) {
                header.write(bytes);
            }
            room[header_len..][..packet.len()].copy_from_slice(&packet);
            far.read += 1;
            match header_len {
                0 => cx.complete_read(slot, packet.len()),
                n => cx.complete_read_with_header(slot, n + packet.len()),
            }
        }
        while let Some(slot) = cx.take_write() {
            self.kept.push(slot);
        }
        if far.behaviour != Behaviour::Keeps {
            for mut slot in self.kept.drain(..) {
                if far.behaviour == Behaviour::Refuses {
                    cx.fail(slot, Status::InvalidAccess);
                    continue;
                }
                let bytes = slot.packet_with_header_mut(header_len).unwrap();
                let header = bytes.first_chunk().filter(|_| header_len > 0);
                let header = header
                    .map_or(OffloadHeader::NONE, |bytes| OffloadHeader::parse(bytes).unwrap());
                far.written.push((header, bytes[header_len..].to_vec()));
                cx.complete_write(slot);
            }
        }
        Ok(Progress::Idle)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.near.as_ref().map(AsFd::as_fd)
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        self.kept.drain(..).for_each(|slot| cx.cancel(slot));
        true
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LONG, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

const FROM: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
const TO: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);

/// TCP over IPv4 with this much payload and a partial checksum. It is to be cut into segments of
/// 1,000 bytes if it is longer.
fn tcp(payload: usize) -> (OffloadHeader, Vec<u8>) {
    let payload: Vec<u8> = (0..payload).map(|i| (i / 7) as u8).collect();
    let repr = TcpRepr {
        src_port: 1,
        dst_port: 2,
        control: TcpControl::None,
        seq_number: TcpSeqNumber(5),
        ack_number: Some(TcpSeqNumber(6)),
        window_len: 100,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &payload,
    };
    let mut packet = vec![2; 34 + repr.buffer_len()];
    packet[12..14].copy_from_slice(&[8, 0]);
    let ip = Ipv4Repr {
        src_addr: FROM,
        dst_addr: TO,
        next_header: IpProtocol::Tcp,
        payload_len: repr.buffer_len(),
        hop_limit: 9,
    };
    let caps = ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut packet[14..]), &caps);
    let mut view = TcpPacket::new_unchecked(&mut packet[34..]);
    repr.emit(&mut view, &FROM.into(), &TO.into(), &ChecksumCapabilities::ignored());
    // The sum over the pseudo header.
    let words = [FROM.octets(), TO.octets()].concat();
    let words = words.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum = words.sum::<u32>() + 6 + repr.buffer_len() as u32;
    view.set_checksum((sum + (sum >> 16)) as u16);
    let mut header = OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        num_buffers: 1,
        ..OffloadHeader::NONE
    };
    if payload.len() > 1000 {
        (header.gso, header.segment_size) = (Gso::TcpV4, 1000);
    }
    (header, packet)
}

/// Checks the checksums of a packet, and returns its payload.
fn judged(packet: &[u8]) -> &[u8] {
    let ip = EthernetFrame::new_checked(packet).unwrap().payload();
    let ip = Ipv4Packet::new_checked(ip).unwrap();
    assert!(ip.verify_checksum());
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&IpAddress::from(FROM), &IpAddress::from(TO)));
    tcp.payload()
}

fn plain(len: usize) -> (OffloadHeader, Vec<u8>) {
    (OffloadHeader::NONE, vec![3; len])
}

fn checksums() -> Offloads {
    let mut offloads = Offloads::default();
    (offloads.checksum, offloads.virtio_header) = (true, true);
    offloads
}

/// Sends everything that one wire holds over a bridge to the other.
fn cross(from: &Wire, to: &Wire, software: bool, depth: u32) -> Summary {
    let packets = from.state.lock().unwrap().incoming.len();
    let ends = [from.end("one"), to.end("other")];
    let work = if software { InSoftware::CutAndMerge } else { InSoftware::Nothing };
    let running = Running::ending_within(LONG, ends, work, depth);
    until("everything is read", || from.read() == packets);
    let start = Instant::now();
    let summary = running.end();
    assert!(start.elapsed() < LONG, "it waited for packets that do not come");
    summary
}

/// An end with every offload, which carries packets of 64 KiB.
fn large() -> Wire {
    Wire { max_packet_size: Some(65_549), ..Wire::with(Offloads::ALL) }
}

#[test]
fn what_an_end_cannot_do_is_done_in_software() {
    let packets = || [tcp(10_500), tcp(500), plain(60), tcp(2000)];
    // Many packets, through few frames.
    let times = 50;
    let from = large().holding((0..times).flat_map(|_| packets()));
    let to = Wire::default();
    let summary = cross(&from, &to, true, 4);
    let direction = &summary.directions[0];
    assert_eq!(
        (direction.packets_cut, direction.checksums_completed, direction.drops),
        (2 * times, times, 0)
    );
    assert_eq!((direction.packets_read, direction.packets_written), (4 * times, 15 * times));
    let written = to.written();
    for packets in written.chunks(15) {
        assert!(packets.iter().all(|(header, _)| *header == OffloadHeader::NONE));
        assert_eq!(packets[12].1, plain(60).1, "in its place");
        let payload = |packets: &[(OffloadHeader, Vec<u8>)]| -> Vec<u8> {
            packets.iter().flat_map(|(_, packet)| judged(packet).to_vec()).collect()
        };
        assert_eq!(payload(&packets[..11]), &tcp(10_500).1[54..]);
        assert_eq!(payload(&packets[11..12]), &tcp(500).1[54..]);
        assert_eq!(payload(&packets[13..]), &tcp(2000).1[54..]);
    }
}

/// The segments of a TCP packet as frames of a guest without offload, whose first byte of payload has
/// this sequence number.
fn frames_of((header, packet): &(OffloadHeader, Vec<u8>)) -> Vec<(OffloadHeader, Vec<u8>)> {
    let segments = vmring::software::Segments::new(header, packet).unwrap();
    let write = |index| {
        let mut frame = vec![0; segments.len_max()];
        let len = segments.write(index, &mut frame).unwrap();
        frame.truncate(len);
        (OffloadHeader::NONE, frame)
    };
    (0..segments.count()).map(write).collect()
}

/// Frames of a stream and others between them, from an end without offload to one that cuts. Cut
/// again, they are what they were. Nothing waits for more frames, so the last one arrives, too.
#[test]
fn short_packets_are_merged_for_an_end_that_cuts_them() {
    let frames = frames_of(&tcp(10_500));
    let corrupt = {
        let (header, mut packet) = frames[4].clone();
        packet[100] ^= 1;
        (header, packet)
    };
    let packets = [&frames[..], &[plain(60)], &frames[..3], &[corrupt], &frames[4..]].concat();
    for work in [InSoftware::CutAndMerge, InSoftware::Cut] {
        let from = Wire::default().holding(packets.clone());
        let to = large();
        let running = Running::with([from.end("one"), to.end("other")], work, 64);
        until("everything is read", || from.read() == packets.len());
        let summary = running.end();
        let direction = &summary.directions[0];
        let written = to.written();
        let read = packets.len() as u64;
        assert_eq!((direction.packets_read, direction.drops), (read, 0));
        assert_eq!(direction.packets_written, written.len() as u64);
        if work == InSoftware::Cut {
            assert_eq!((direction.segments_merged, direction.packets_merged), (0, 0));
            assert_eq!(written, packets);
            continue;
        }
        // They are read in one batch, because as many reads are posted. Those behind the corrupt one
        // go on with another sequence number than those before it.
        assert_eq!((direction.segments_merged, direction.packets_merged), (11 + 3 + 7, 3));
        let lens: Vec<usize> = written.iter().map(|(_, packet)| packet.len()).collect();
        assert_eq!(lens, [54 + 10_500, 60, 54 + 3000, 54 + 1000, 54 + 6500]);
        let mut came = Vec::new();
        for packet in &written {
            match packet.0.gso {
                Gso::None => came.push(packet.clone()),
                _ => came.extend(frames_of(packet)),
            }
        }
        assert_eq!(came, packets);
        assert_eq!(
            direction.bytes_written,
            written.iter().map(|(_, packet)| packet.len() as u64).sum::<u64>()
        );
        let text = summary.text();
        assert!(text.contains("Merged from one to other: 21 packets into 3\n"), "{text}");
    }

    // An end that refuses USO, as a TAP of Linux before 6.2 does, gets datagrams one by one.
    let udp = |i: u8| {
        let mut packet = frames[0].1[..34 + 8 + 100].to_vec();
        packet[16..18].copy_from_slice(&128_u16.to_be_bytes());
        (packet[19], packet[23]) = (i, 17);
        Ipv4Packet::new_unchecked(&mut packet[14..]).fill_checksum();
        packet[38..40].copy_from_slice(&108_u16.to_be_bytes());
        let mut view = UdpPacket::new_unchecked(&mut packet[34..]);
        view.fill_checksum(&FROM.into(), &TO.into());
        (OffloadHeader::NONE, packet)
    };
    for (uso, expected) in [(true, (6, 1)), (false, (0, 0))] {
        let mut offloads = Offloads::ALL;
        offloads.uso = uso;
        let from = Wire::default().holding((0..6).map(udp));
        let summary = cross(&from, &Wire { offloads, ..large() }, true, 16);
        let direction = &summary.directions[0];
        assert_eq!((direction.segments_merged, direction.packets_merged), expected);
    }
}

#[test]
fn segments_leave_their_checksum_to_an_end_that_completes_it() {
    let from = large().holding([tcp(2500), tcp(500)]);
    let to = Wire::with(checksums());
    let summary = cross(&from, &to, true, 16);
    assert_eq!(
        (summary.directions[0].packets_cut, summary.directions[0].checksums_completed),
        (1, 0)
    );
    let written = to.written();
    assert_eq!(written.len(), 4);
    for (header, mut packet) in written {
        let partial = OffloadHeader { num_buffers: 0, ..tcp(500).0 };
        assert_eq!(header, partial);
        vmring::software::complete_checksum(&header, &mut packet).unwrap();
        judged(&packet);
    }
}

#[test]
fn between_ends_that_do_the_same_packets_go_as_they_are() {
    for software in [false, true] {
        // A packet that others may be appended to is held to the end of its batch.
        let packets = [tcp(10_500), plain(60), tcp(500)];
        let (from, to) = (large().holding(packets.clone()), large());
        let summary = cross(&from, &to, software, 16);
        let direction = &summary.directions[0];
        assert_eq!(
            (direction.packets_written, direction.packets_cut, direction.checksums_completed),
            (3, 0, 0)
        );
        let sent = packets.map(|(header, packet)| (header.for_sending(), packet));
        assert_eq!(to.written(), sent);
    }
}

#[test]
fn a_packet_that_the_other_end_cannot_take_is_dropped_and_counted() {
    let ufo = OffloadHeader { gso: Gso::Udp, ..tcp(2000).0 };
    let ufo = (
        OffloadHeader { checksum: Checksum::Partial { start: 34, offset: 6 }, ..ufo },
        tcp(2000).1,
    );
    let long = (OffloadHeader { segment_size: 1500, ..tcp(4000).0 }, tcp(4000).1);
    let wrong = (OffloadHeader { segment_size: 0, ..tcp(4000).0 }, tcp(4000).1);
    let drops = |from: Wire, to: &Wire, software| {
        let summary = cross(&from, to, software, 16);
        assert_eq!(summary.directions[0].packets_written, 1, "the good one");
        let drops = summary.directions[0].drops_by_reason.clone();
        assert_eq!(summary.directions[0].drops, drops.values().sum::<u64>());
        drops.into_iter().collect::<Vec<_>>()
    };
    let counted = |counts: &[(&str, u64)]| -> Vec<(String, u64)> {
        counts.iter().map(|(why, n)| ((*why).to_owned(), *n)).collect()
    };
    const TOO_BIG: &str = "too big for the other end";

    let from =
        large().holding([plain(1515), plain(1514), long.clone(), ufo.clone(), wrong.clone()]);
    let expected = [("bad offload header", 1), ("cannot be segmented", 1), (TOO_BIG, 2)];
    assert_eq!(drops(from, &Wire::default(), true), counted(&expected));

    let from = large().holding([tcp(2000), tcp(500), plain(1514)]);
    let expected = [("offload that the other end does not do", 2)];
    assert_eq!(drops(from, &Wire::default(), false), counted(&expected));

    // The space of 64 KiB is only for packets whose header says how to segment them.
    let from = large().holding([plain(1519), plain(1518), long]);
    assert_eq!(drops(from, &large(), false), counted(&[(TOO_BIG, 2)]));
}

#[test]
fn a_slow_end_holds_the_other_back_and_nothing_is_lost() {
    let packets: Vec<_> = (0..1000_u32)
        .map(|i| (OffloadHeader::NONE, [&[4; 14][..], &i.to_be_bytes()].concat()))
        .collect();
    // On devices that call, and on devices that have a descriptor: on either side, or on both.
    for has_descriptor in [[false, false], [true, false], [false, true], [true, true]] {
        let [from, to] =
            has_descriptor.map(|has_descriptor| Wire { has_descriptor, ..Wire::default() });
        let from = from.holding(packets.clone());
        let to = to.that(Behaviour::Keeps).holding([plain(77), plain(78)]);
        let running = Running::start([from.end("one"), to.end("other")], false, 16);
        // Those that the device keeps, and as many that wait.
        until("its frames are all taken", || from.read() == 32);
        until("the way back is free", || from.written().len() == 2);
        thread::sleep(Duration::from_millis(50));
        assert_eq!((from.read(), to.written().len()), (32, 0));
        to.becomes(Behaviour::Takes);
        until("all come", || to.written().len() == 1000);
        assert_eq!(to.written(), packets);
        assert_eq!(running.end().directions[0].drops, 0);
    }
}

#[test]
fn writes_that_fail_are_counted_by_reason_and_their_frames_go_on() {
    let from = Wire::default().holding((0..500).map(|_| plain(100)));
    let to = Wire::default().that(Behaviour::Refuses);
    let summary = cross(&from, &to, false, 8);
    let why = format!("write failed: {}", Status::InvalidAccess);
    let drops: Vec<_> = summary.directions[0].drops_by_reason.clone().into_iter().collect();
    assert_eq!((drops, summary.directions[0].packets_written), (vec![(why, 500)], 0));
}

#[test]
fn packets_that_cannot_be_read_and_runts_are_counted_by_reason() {
    let from = Wire::default().that(Behaviour::Refuses).holding((0..5).map(|_| plain(100)));
    let to = Wire::default();
    let running = Running::start([from.end("one"), to.end("other")], false, 8);
    until("they are refused", || from.state.lock().unwrap().incoming.is_empty());
    from.state.lock().unwrap().incoming.extend([plain(100), (OffloadHeader::NONE, vec![4; 13])]);
    from.becomes(Behaviour::Takes);
    until("the good one comes", || to.written().len() == 1);
    let summary = running.end();
    let drops: Vec<_> = summary.directions[0].drops_by_reason.clone().into_iter().collect();
    let failed = format!("read failed: {}", Status::PacketTooBig);
    let runt = "shorter than an Ethernet header".to_owned();
    assert_eq!(drops, [(failed, 5), (runt, 1)]);
    assert_eq!(summary.directions[0].drops, 6);
}

/// A pcap file with this many packets of 60 bytes.
fn pcap(name: &str, packets: usize) -> std::path::PathBuf {
    let mut file = Vec::new();
    // The magic number, the version, no zone, the snapshot length, and Ethernet.
    for word in [0xa1b2_c3d4_u32, 4 << 16 | 2, 0, 0, 65_535, 1] {
        file.extend(word.to_le_bytes());
    }
    for _ in 0..packets {
        for word in [0_u32, 0, 60, 60] {
            file.extend(word.to_le_bytes());
        }
        file.extend([4; 60]);
    }
    let name = format!("vmring bridge {name} {}.pcap", std::process::id());
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, file).unwrap();
    path
}

/// How often this happened at the end.
fn count_at(end: &crate::bridge::summary::EndSummary, why: &str) -> Option<u64> {
    end.drops_by_reason.get(why).copied()
}

#[test]
fn what_a_file_does_not_deliver_and_does_not_take_is_counted() {
    let path = pcap("file", 100);
    let file = Spec::Pcap(path.clone());
    let start = || file.start(Offloads::default(), None, defaults()).unwrap();
    // Its packets go into an end that takes none: most are not replayed.
    let to = Wire::default().that(Behaviour::Keeps);
    let running = Running::start([start(), to.end("other")], false, 4);
    thread::sleep(Duration::from_millis(50));
    let summary = running.end();
    let (direction, end) = (&summary.directions[0], &summary.ends[0]);
    assert_eq!(direction.packets_read + count_at(end, "not replayed before the end").unwrap(), 100);

    // What is written to a file that is only replayed goes nowhere.
    let from = Wire::default().holding((0..30).map(|_| plain(100)));
    let summary = cross(&from, &Wire::default(), false, 8);
    assert!(summary.ends.iter().all(|end| end.drops_by_reason.is_empty()), "{summary:?}");
    let from = Wire::default().holding((0..30).map(|_| plain(100)));
    let running = Running::start([from.end("one"), start()], false, 8);
    until("everything is read", || from.read() == 30);
    let summary = running.end();
    assert_eq!(summary.directions[0].packets_written, 30);
    let why = "written to a file that is only replayed";
    assert_eq!(count_at(&summary.ends[1], why), Some(30));
    std::fs::remove_file(path).unwrap();
}

/// The kernel drops what comes while the TAP's queue is full. Only its own counter says so.
#[cfg(target_os = "linux")]
#[test]
fn what_the_kernel_drops_before_a_tap_is_counted() {
    use std::net::UdpSocket;

    let counted = crate::tap::in_namespace(|| {
        let end = spec("tap:vmrfull,host").start(Offloads::default(), None, defaults())?;
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        let to = Wire::default();
        let running = Running::start([end, to.end("other")], false, 4);
        let send = || drop(socket.send_to(&[0; 32], "192.168.128.255:9"));
        // What the kernel has dropped before the bridge begins is not the bridge's.
        until("the bridge begins", || {
            send();
            !to.written().is_empty()
        });
        to.becomes(Behaviour::Keeps);
        let dropped = || -> u64 {
            let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = table.lines().find_map(|line| line.trim_start().strip_prefix("vmrfull:"));
            line.unwrap().split_whitespace().nth(11).unwrap().parse().unwrap()
        };
        let before = dropped();
        // The queue of a TAP has 1,000 places.
        until("the kernel drops what comes", || {
            (0..1000).for_each(|_| send());
            dropped() > before + 1000
        });
        let dropped = before..dropped();
        let summary = running.end();
        let read = summary.directions[0].packets_read;
        Ok((read, dropped, count_at(&summary.ends[0], "for a full TAP")))
    });
    match counted.and_then(|counted| counted) {
        Ok((read, dropped, counted)) => {
            // It may count what was dropped before, and a few packets of the kernel's own since then.
            let right = dropped.end - dropped.start..=dropped.end + 100;
            let is_right = counted.is_some_and(|counted| right.contains(&counted));
            assert!(is_right, "{read} were read, {dropped:?} dropped, {counted:?} counted");
        }
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "skipped: a TAP that is full: {failure}");
        }
    }
}

/// The card of the demo's guests counts what it could not send.
#[test]
fn a_guests_card_counts_the_packets_that_it_could_not_send_or_receive() {
    use smoltcp::phy::{Device as _, TxToken as _};

    let card = |wire: &Wire| {
        let interface = Interface::builder().device(wire.clone()).start().unwrap();
        let ring = interface.ring(Direction::Both).drive(Drive::Inline).build().unwrap();
        (NetworkCard::new(ring, 8, 8, false), interface)
    };
    let send = |card: &mut NetworkCard| {
        let token = card.transmit(smoltcp::time::Instant::ZERO).unwrap();
        token.consume(60, |packet| packet.fill(4));
    };
    let wire = Wire::default().that(Behaviour::Refuses).holding([plain(60), plain(60)]);
    let (mut refused, _interface) = card(&wire);
    (0..3).for_each(|_| send(&mut refused));
    refused.flush().unwrap();
    let (losses, closed) = refused.close();
    closed.unwrap();
    let [read, write] = [
        format!("read failed: {}", Status::PacketTooBig),
        format!("write failed: {}", Status::InvalidAccess),
    ];
    assert_eq!(losses.into_iter().collect::<Vec<_>>(), [(read, 2), (write, 3)]);

    // Two that the device keeps, and one that was not submitted.
    let (mut kept, _interface) = card(&Wire::default().that(Behaviour::Keeps));
    (0..2).for_each(|_| send(&mut kept));
    kept.flush().unwrap();
    send(&mut kept);
    let (losses, closed) = kept.close();
    closed.unwrap();
    assert_eq!(losses.into_iter().collect::<Vec<_>>(), [("not sent at the end".to_owned(), 3)]);

    let wire = Wire::default();
    let (mut good, _interface) = card(&wire);
    send(&mut good);
    good.flush().unwrap();
    assert!(good.close().0.is_empty());
    assert_eq!(wire.written().len(), 1);
}

#[test]
fn what_cannot_be_written_before_the_end_is_counted() {
    let from = Wire::default().holding((0..100).map(|_| plain(100)));
    let to = Wire::default().that(Behaviour::Keeps);
    let running = Running::start([from.end("one"), to.end("other")], false, 8);
    until("its frames are all taken", || from.read() == 16);
    let summary = running.end();
    let direction = &summary.directions[0];
    assert_eq!(direction.packets_read, direction.drops + direction.packets_written);
    assert_eq!(direction.drops_by_reason.get("not written at the end"), Some(&16), "{direction:?}");
}

#[test]
fn an_end_that_dies_ends_the_bridge_with_its_name() {
    let (from, to) = (Wire::default(), Wire::default());
    let running = Running::start([from.end("one"), to.end("other")], false, 8);
    thread::sleep(Duration::from_millis(20));
    to.becomes(Behaviour::Dies);
    let (_, outcome) = running.thread.join().unwrap();
    let failure = outcome.unwrap_err();
    assert_eq!(failure.exit_code(), 1);
    let sentence = failure.to_string();
    assert!(sentence.starts_with("other: the device failed for good"), "{sentence}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_tap_has_a_mode_and_a_subnet_if_they_are_named() {
    let parsed = |text: &str| match spec(text) {
        Spec::Tap { name, mode, subnet, .. } => (name, mode, subnet),
        other => panic!("{other:?}"),
    };
    let named = |mode, subnet| ("t0".to_owned(), mode, subnet);
    assert_eq!(parsed("tap:t0"), named(None, None));
    assert_eq!(parsed("tap:t0,host"), named(Some(vmring::Mode::Host), None));
    let subnet = "10.7.0.1/24".parse().unwrap();
    assert_eq!(
        parsed("tap:t0,shared,10.7.0.1/24"),
        named(Some(vmring::Mode::Shared), Some(subnet))
    );
    for (text, said) in [
        ("tap:t0,shared,10.7.0.1", "GATEWAY/BITS"),
        ("tap:t0,10.7.0.1/24", "the mode must be host, shared or bridged:INTERFACE"),
        ("tap:t0,bridged:br0,10.7.0.1/24", "the network behind a bridge has its own"),
    ] {
        let error = text.parse::<Spec>().unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn ends_are_written_as_a_kind_and_a_name() {
    for text in ["embedded:lab", "qemu:a.sock", "vfkit:b", "pcap:a b.pcapng", "capture:x:y"] {
        assert_eq!(spec(text).to_string(), text);
    }
    assert_eq!(spec("embedded:lab,10.0.0.1/24").to_string(), "embedded:lab");
    assert_eq!(spec(VMNET).to_string(), format!("{VMNET}:shared"));
    assert_eq!(spec(&format!("{VMNET}:host")), Spec::Vmnet(VmnetSpec::of(vmring::Mode::Host)));
    for (text, said) in [
        ("abacus:x", "there is no end 'abacus:x'; use embedded:NETWORK"),
        ("", "there is no end ''"),
        ("embedded", "'embedded' needs the name of a network, like embedded:lab"),
        ("embedded:", "'embedded' needs the name"),
        ("pcap", "'pcap' needs a file, like pcap:run.pcapng"),
        ("embedded:lab,10.0.0.1", "GATEWAY/BITS"),
        ("qemu:", "'qemu' needs a path, like qemu:/run/vm.sock"),
        ("qemu:a,b", "'b' is no setting of a wire"),
    ] {
        let error = text.parse::<Spec>().unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn two_ends_that_cannot_be_joined_are_refused() {
    for (a, b, said) in [
        ("embedded:lab", "embedded:lab", "name two networks"),
        ("embedded:lab", "embedded:lab,10.0.0.1/24", "name two networks"),
        (VMNET, VMNET, "round for ever"),
        ("qemu:a", "vfkit:a,client", "name two"),
        ("capture:a", "capture:b", "nothing comes out"),
        ("pcap:a", "capture:a", "name another"),
        ("capture:./Cargo.toml", "pcap:Cargo.toml", "name another"),
    ] {
        let failure = spec::check(&spec(a), &spec(b)).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.to_string().contains(said), "{a} {b}: {failure}");
    }
    for (a, b) in [("embedded:lab", "embedded:bal"), ("pcap:a", "pcap:a"), ("pcap:a", "capture:b")]
    {
        spec::check(&spec(a), &spec(b)).unwrap();
    }
}

/// An end with the offloads `able`. It starts with any of them, unless `has_all_or_none`.
fn able(able: Offloads, has_all_or_none: bool, wanted: Offloads) -> Result<End, Failure> {
    let all_or_none = wanted == able || wanted == Offloads::default();
    if wanted & able != wanted || has_all_or_none && !all_or_none {
        return Err(Failure::Usage("it has not that".to_owned()));
    }
    Ok(Wire { max_packet_size: Some(65_549), ..Wire::with(wanted) }.end("able"))
}

#[test]
fn an_end_starts_with_as_much_as_it_grants() {
    let (none, all) = (Offloads::default(), Offloads::ALL);
    let mut tcp = all;
    tcp.uso = false;
    for has in [all, tcp, checksums(), none] {
        for wanted in [all, tcp, checksums(), none] {
            let end = spec::start_with_most(wanted, |offloads| able(has, false, offloads));
            assert_eq!(end.unwrap().offloads(), has & wanted);
        }
    }
    let mut tries = 0;
    let broken = spec::start_with_most(all, |_| {
        tries += 1;
        Err(Failure::Step("no permission".to_owned()))
    });
    assert_eq!((broken.unwrap_err().to_string().as_str(), tries), ("no permission", 1));
}

#[test]
fn two_ends_are_started_anew_with_what_both_have() {
    let (none, all) = (Offloads::default(), Offloads::ALL);
    let mut mute = all;
    mute.virtio_header = false;
    for (has, rigid, both) in [
        ([all, all], false, all),
        ([all, checksums()], false, checksums()),
        ([checksums(), all], false, checksums()),
        ([all, none], false, none),
        ([all, mute], false, none),
        // One of them cannot have exactly the common offloads, so neither has any.
        ([all, checksums()], true, none),
        ([checksums(), all], true, none),
    ] {
        let ends = has.map(|has| able(has, rigid, has).unwrap());
        let alike = spec::start_alike(ends, |i, offloads| able(has[i], rigid, offloads));
        let offloads = alike.unwrap().each_ref().map(End::offloads);
        assert_eq!(offloads, [both, both], "{has:?}");
    }
}

/// The simulated vmnet grants TCP offloads, and the embedded network is asked for none.
#[cfg(not(target_os = "macos"))]
#[test]
fn both_ends_start_with_what_both_do_or_each_with_its_own() {
    let host = format!("{VMNET}:host");
    let offloads = |b: &str, software| {
        let offload = if software { Offload::Software } else { Offload::Common };
        let ends = spec::start([&spec(VMNET), &spec(b)], offload, None, None, defaults()).unwrap();
        ends.each_ref().map(|end| crate::report::offload_names(end.offloads()))
    };
    let none: Vec<&str> = Vec::new();
    let tcp = vec!["checksum", "tso4", "tso6", "virtio_header"];
    assert_eq!(offloads("embedded:offloads", false), [none.clone(), none.clone()]);
    assert_eq!(offloads("embedded:offloads", true), [tcp.clone(), none]);
    assert_eq!(offloads(&host, false), [tcp.clone(), tcp.clone()]);
    assert_eq!(offloads(&host, true), [tcp.clone(), tcp]);
}

/// An end that is told to offload nothing is asked for nothing; the other one is asked as before.
#[cfg(not(target_os = "macos"))]
#[test]
fn one_end_can_be_told_to_offload_nothing() {
    let specs = [spec(&format!("{VMNET}:host")), spec(&format!("{VMNET}:shared"))];
    let names = |offload, plain| {
        let ends = spec::start([&specs[0], &specs[1]], offload, plain, None, defaults()).unwrap();
        ends.each_ref().map(|end| crate::report::offload_names(end.offloads()).len())
    };
    assert_eq!(names(Offload::Software, None), [4, 4]);
    assert_eq!(names(Offload::Software, Some(super::spec::WhichEnd::A)), [0, 4]);
    assert_eq!(names(Offload::Software, Some(super::spec::WhichEnd::B)), [4, 0]);
    assert_eq!(names(Offload::Common, Some(super::spec::WhichEnd::B)), [0, 0]);
}

/// Raw frames from a ring on one network to a ring on another. This thread drives both, and a
/// window of frames is in flight.
#[test]
#[ignore = "a measurement: cargo test -p vmring-cli --release speed -- --ignored --nocapture"]
fn speed() {
    const PACKETS: u64 = 3_000_000;
    const WINDOW: u64 = 512;
    for len in [64, 1514] {
        let networks = ["speed one", "speed two"];
        let specs = networks.map(|network| spec(&format!("embedded:{network}")));
        let ends =
            spec::start([&specs[0], &specs[1]], Offload::Common, None, None, defaults()).unwrap();
        let interfaces = networks.map(|name| {
            let driver = Embedded::network(name).overflow(QUEUE);
            Interface::builder().device(driver).start().unwrap()
        });
        let [mut from, mut to] = interfaces.each_ref().map(|interface| {
            let ring = interface.ring(Direction::Both).drive(Drive::Inline).depth(1024);
            ring.build().unwrap()
        });
        let running = Running::start(ends, false, 256);
        let frames: Vec<_> = std::iter::from_fn(|| to.alloc()).take(1024).collect();
        to.submit_reads(frames.into_iter().zip(0..)).unwrap();
        let mut packet = vec![0; len];
        packet[..6].copy_from_slice(&interfaces[1].mac().into_array());
        packet[6..12].copy_from_slice(&interfaces[0].mac().into_array());
        let mut free: Vec<_> = std::iter::from_fn(|| from.alloc()).take(1024).collect();
        for frame in &mut free {
            frame.copy_from(&packet).unwrap();
        }
        let (mut sent, mut received) = (0, 0);
        let start = Instant::now();
        while received < PACKETS {
            free.extend(from.reap().filter_map(|done| done.take_frame()));
            let room = (WINDOW - (sent - received)).min(PACKETS - sent) as usize;
            let keep = free.len() - room.min(free.len());
            sent += from.submit_writes(free.drain(keep..).map(|frame| (frame, 0))).unwrap() as u64;
            if room == 0 {
                to.wait(1, Some(Duration::from_secs(1)));
            }
            let came: Vec<_> = to.reap().filter_map(|done| done.take_frame()).collect();
            let came = came.into_iter().map(|frame| (frame, 0));
            received += to.submit_reads(came).unwrap() as u64;
            assert!(start.elapsed() < LONG, "{received} of {sent} came");
        }
        let seconds = start.elapsed().as_secs_f64();
        let summary = running.end();
        eprintln!(
            "{len} bytes: {:.0} packets/s, {:.2} Gbit/s; batches {:?}; dropped {:?}",
            PACKETS as f64 / seconds,
            PACKETS as f64 * len as f64 * 8.0 / seconds / 1e9,
            summary.directions[0].read_batches,
            summary.ends[1].drops_by_reason,
        );
    }
}
