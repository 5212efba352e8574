//! What the kernel's TAP puts into the memory of a guest: one packet into one buffer or into several.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmring::device::Offloads;
use vmring::guest::{GuestMapping, GuestMemory, GuestRegion};
use vmring::{
    Completion, Direction, EntryError, GuestMmap, Interface, Poller, Ring, RingBuilder, RingOp,
    SegmentTable, Status, Tap, TapEngine,
};

use crate::contracts::merging::{Group, arrivals, packet_of};
use crate::guest_memory::{Guest, HEADER};
use crate::netns::{in_namespace, sh};
use crate::support::{
    Dice, LONG, Way, drive_to_rest, eventually, every_way, packet_between, scaled, stage,
};
use crate::tap_traffic::kernel_counts;

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The longest packet that Linux leaves to a TAP to be cut: it cuts what has 65,536 bytes or more
/// (`gso_features_check` in the kernel's `net/core/dev.c`).
const LONGEST: usize = 65_535;
/// The size of a buffer of Linux's driver with large pages.
const PAGE: u32 = 4096;
const ENGINES: [TapEngine; 2] = [TapEngine::Plain, TapEngine::IoUring];

/// The header of a TCP packet that is to be cut into packets of the MTU, as the kernel writes it. The
/// last two bytes are the number of buffers.
const TO_CUT: [u8; 10] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];

/// Sends frames on an interface of this thread's namespace, as the host's kernel does.
struct Sender(OwnedFd);

impl Sender {
    fn on(interface: &str) -> Self {
        const PACKET_VNET_HDR: libc::c_int = 15;
        let name = std::ffi::CString::new(interface).expect("a name");
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just opened, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        // SAFETY: the name ends with a zero and lives through the call.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        let len = size_of_val(&address) as u32;
        // SAFETY: the address lives through the call.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        let on: libc::c_int = 1;
        let (level, value) = (libc::SOL_PACKET, (&raw const on).cast());
        // SAFETY: the value lives through the call, and has the length that is told.
        let set = unsafe { libc::setsockopt(fd.as_raw_fd(), level, PACKET_VNET_HDR, value, 4) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    fn send(&self, packet: &[u8]) {
        let header = if packet.len() > 9200 { TO_CUT } else { [0; 10] };
        let bytes = [&header[..], packet].concat();
        // SAFETY: the bytes live through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
    }
}

/// A packet of this length: of the tests' ethertype, or TCP if it is so long that it is to be cut.
fn packet(number: u64, len: usize) -> Vec<u8> {
    let mut packet = packet_between(HOST, GUEST, number, len);
    if len > 9200 {
        packet[12..14].copy_from_slice(&[0x08, 0x00]);
        packet[14..34].fill(0);
        packet[14] = 0x45;
        packet[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        packet[23] = 6;
        packet[46] = 0x50;
    }
    packet
}

/// A TAP with nothing on it but what the test sends.
struct World {
    interface: Interface,
    guest: Guest,
    sender: Sender,
    next: u64,
}

impl World {
    fn new(engine: TapEngine, mtu: u32, offload: bool) -> Self {
        Self::with_buffers(engine, 96, mtu, offload)
    }

    fn with_buffers(engine: TapEngine, buffers: usize, mtu: u32, offload: bool) -> Self {
        let mut offloads = Offloads::default();
        if offload {
            (offloads.checksum, offloads.tso4, offloads.tso6) = (true, true, true);
        }
        let tap = Tap::named("t0").configure(false).engine(engine);
        let builder = Interface::builder().mtu(mtu).offloads(offloads).device(tap);
        let interface = builder.start().expect("it starts");
        assert!(interface.capabilities().merges_reads);
        let longest = interface.capabilities().max_packet_size as usize;
        let guest = Guest::new(buffers, longest.min(PAGE as usize));
        let sender = Sender::on("t0");
        Self { interface, guest, sender, next: 0 }
    }

    fn builder(&self, depth: u32) -> RingBuilder<'_> {
        let builder = self.interface.ring(Direction::Read).read_depth(depth).mergeable_reads(true);
        builder.frames(4).segment_table(self.guest.table())
    }

    /// Posts buffers of `len` bytes, with the header. Their numbers go on from the last one.
    fn post(&mut self, ring: &mut Ring, count: u64, len: u32) {
        for _ in 0..count {
            let buffer = self.guest.buffer_of(self.next, len);
            ring.submit_read_guest(buffer, self.next).expect("a credit");
            self.next += 1;
        }
    }

    /// As [`post`](Self::post), with buffers of one piece.
    fn post_pieces(&mut self, ring: &mut Ring, count: u64, len: u32) {
        for _ in 0..count {
            let buffer = self.guest.piece_of(self.next, len);
            ring.submit_read_guest(buffer, self.next).expect("a credit");
            self.next += 1;
        }
    }

    /// Waits for the next packet. Checks what is in its buffers, and frees them.
    fn expect(&mut self, ring: &mut Ring, expected: &[u8]) -> Group {
        assert!(ring.wait(1, Some(LONG)) > 0, "nothing comes: {:?}", self.interface.drops());
        let mut groups = arrivals(ring);
        assert_eq!(groups.len(), 1, "{groups:?}");
        let group = groups.remove(0);
        self.check(&group, expected);
        group
    }

    fn check(&mut self, group: &Group, expected: &[u8]) {
        let (header, bytes) = packet_of(&self.guest, group);
        assert_eq!(bytes.len(), expected.len());
        assert!(bytes == expected, "the bytes differ");
        let front = if expected.len() > 9200 { TO_CUT } else { [0; 10] };
        assert_eq!(header[..10], front);
        assert_eq!(header[10..], (group.len() as u16).to_le_bytes());
        group.iter().for_each(|(number, _)| self.guest.free(*number));
    }

    fn too_few(&self) -> u64 {
        let drops = self.interface.drops();
        drops.into_iter().find(|(name, _)| *name == "too few reads").expect("it counts them").1
    }

    /// Waits until the queue has taken `packets` packets out of the TAP since it was made.
    fn until_taken(&self, ring: &mut Ring, packets: u64) {
        eventually("the queue takes it out of the TAP", || {
            drive_to_rest(ring);
            kernel_counts("t0").sent == packets
        });
        assert_eq!(ring.ready(), 0);
    }
}

/// Goal: what a guest sends into a TAP is copied by the kernel alone, and nobody writes to it. The header
/// is copied once, and the copy is checked: one that asks for what was not negotiated is refused, also if
/// the guest writes it after the submission. Method: a TAP that completes checksums and cuts nothing. The
/// page with the packets is made read-only.
#[test]
fn a_guests_header_is_checked_where_the_guest_cannot_change_it() {
    every_engine(|engine, way, poller| {
        let mut offloads = Offloads::default();
        offloads.checksum = true;
        let tap = Tap::named("t0").configure(false).engine(engine);
        let builder = Interface::builder().offloads(offloads).device(tap);
        let interface = builder.start().expect("it starts");
        let page = vmring::page_size();
        let mapping = Arc::new(GuestMmap::anonymous(2 * page).expect("a mapping"));
        let start = mapping.start().as_ptr();
        let memory = GuestMemory::new([GuestRegion::new(0, mapping)]).expect("a region");
        let table = SegmentTable::new(memory.clone(), 64).expect("a table");
        let bytes = packet_between(GUEST, HOST, 5, 700);
        let (plain, later) = ([(0, 12), (100, 300), (500, 400)], [(page as u64, 12), (100, 700)]);
        table.buffer(plain, HEADER).expect("it is there").copy_from(&bytes).expect("it fits");
        // SAFETY: it is the first page of the mapping, to which nobody has a reference.
        let made = unsafe { libc::mprotect(start.cast(), page, libc::PROT_READ) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());

        let write_header = |header: [u8; 10]| {
            let place = memory.slice(page as u64, 10).expect("it is there");
            assert_eq!(place.copy_from(&header), 10);
        };
        let received = kernel_counts("t0").received;
        let builder = interface.ring(Direction::Write).segment_table(&table);
        let mut ring = builder.drive(way.drive(poller)).build().expect("a ring");
        let mut send = |ranges: &[(u64, u32)], change: &dyn Fn()| {
            let mut buffer = table.buffer(ranges.iter().copied(), HEADER).expect("it is there");
            buffer.set_len(700).expect("it has the packet");
            ring.submit_write_guest(buffer, 1).expect("it is taken");
            change();
            assert_eq!(ring.wait(1, Some(LONG)), 1, "it does not end");
            let ended = ring.reap().next().expect("it waits");
            (ended.result, ring.stats().bounced_writes)
        };
        assert_eq!(send(&plain, &|| ()), (Ok(700), 0));
        write_header([0; 10]);
        assert_eq!(send(&later, &|| ()), (Ok(700), 0));
        write_header(TO_CUT);
        let refused = Err(EntryError::Device(Status::InvalidArgument));
        assert_eq!(send(&later, &|| ()), (refused, 0));
        // An inline ring looks at the header when it is driven.
        write_header(if way == Way::Inline { [0; 10] } else { TO_CUT });
        assert_eq!(send(&later, &|| write_header(TO_CUT)), (refused, 0));
        assert_eq!(kernel_counts("t0").received - received, 2);
    });
}

/// The lengths of the parts of a packet in buffers of `buffer` bytes.
fn parts_of(packet: usize, buffer: u32) -> Vec<usize> {
    let mut left = packet + HEADER as usize;
    let mut parts = Vec::new();
    while left > 0 {
        let part = left.min(buffer as usize);
        parts.push(if parts.is_empty() { part - HEADER as usize } else { part });
        left -= part;
    }
    parts
}

fn lengths(group: &Group) -> Vec<usize> {
    group.iter().map(|(_, len)| *len).collect()
}

/// Runs `body` with each engine, driven in each way.
fn every_engine(body: impl Fn(TapEngine, Way, &Poller) + Send + 'static) {
    in_namespace(move || {
        for engine in ENGINES {
            every_way(|way, poller| {
                stage(format!("{engine}, {way:?}"));
                body(engine, way, poller);
                eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
            });
        }
    });
}

/// Whether the descriptor becomes readable in this time.
fn is_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one descriptor.
    unsafe { libc::poll(&mut poll, 1, timeout.as_millis() as i32) > 0 }
}

/// Goal: a packet fills as many posted reads as it needs, in their order, and no byte is copied but by
/// the kernel. The rest stays posted.
#[test]
fn a_packet_fills_posted_reads_without_a_copy() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, true);
        let mut ring = world.builder(64).drive(way.drive(poller)).build().expect("a ring");
        for buffer in [PAGE, 1536] {
            let before = ring.stats().bounced_reads;
            let count = 4 + (LONGEST as u64 + 40) / u64::from(buffer);
            world.post(&mut ring, count, buffer);
            let mut first = world.next - count;
            for (number, len) in (0..).zip([60, 1514, LONGEST]) {
                let packet = packet(number, len);
                world.sender.send(&packet);
                let group = world.expect(&mut ring, &packet);
                assert_eq!(lengths(&group), parts_of(len, buffer));
                assert_eq!(group[0].0, first);
                first += group.len() as u64;
            }
            if way == Way::Inline {
                assert_eq!(ring.stats().bounced_reads, before);
            }
            let left = ring.cancel_and_wait(LONG).expect("the rest is posted") as u64;
            assert_eq!(left, world.next - first);
            for done in ring.reap() {
                assert_eq!(done.result, Err(EntryError::Cancelled));
                world.guest.free(done.user_data);
            }
        }
        assert_eq!(ring.stats().rx_packets, 6);
        ring.close().expect("it closes");
        assert_eq!(world.interface.drops().iter().map(|(_, count)| count).sum::<u64>(), 0);
    });
}

/// Goal: without offload and with a long MTU the same, with the header that has only the number of
/// buffers. A packet that is longer than the interface's longest is dropped, and takes no buffer.
#[test]
fn a_long_mtu_without_offload_fills_several_reads() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 9000, false);
        let mut ring = world.builder(64).drive(way.drive(poller)).build().expect("a ring");
        world.post(&mut ring, 3, PAGE);
        for (number, buffer) in (0..).zip([PAGE, 1536, 600]) {
            let packet = packet(number, 9014);
            world.sender.send(&packet);
            let group = world.expect(&mut ring, &packet);
            // The next buffers are posted now, behind those that are left.
            let all = 9014 / u64::from(buffer) + 2;
            assert!(group.len() > 1, "{group:?}");
            ring.cancel_and_wait(LONG).expect("the rest is posted");
            ring.reap().for_each(|done| world.guest.free(done.user_data));
            world.post(&mut ring, all, buffer);
        }
        // A packet of one byte more than fits, whose IP header tells of a packet that is cut.
        sh("ip link set t0 mtu 9100");
        for len in [9015, 9018, 9019, 9100] {
            let mut long = packet_between(HOST, GUEST, 1, len);
            long[12..14].copy_from_slice(&[0x08, 0x00]);
            long[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
            world.sender.send(&long);
        }
        let short = packet(7, 60);
        world.sender.send(&short);
        assert_eq!(world.expect(&mut ring, &short).len(), 1);
        let drops = world.interface.drops();
        assert_eq!(drops[0], ("too big", 4), "{drops:?}");
        assert_eq!(world.too_few(), 0);
        if way == Way::Inline {
            assert_eq!(ring.stats().bounced_reads, 0);
        }
    });
}

/// Goal: a packet for which too few reads are posted waits for more, and those behind it wait too. The
/// queue sleeps meanwhile, although the TAP is readable. The packet is copied then, and counted.
#[test]
fn a_packet_waits_for_the_reads_that_it_needs() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, true);
        let mut ring = world.builder(64).drive(way.drive(poller)).build().expect("a ring");
        let (long, short) = (packet(1, LONGEST), packet(2, 60));
        world.post(&mut ring, 3, PAGE);
        world.sender.send(&long);
        world.until_taken(&mut ring, 1);
        world.sender.send(&short);
        let before = ring.stats();
        let fd = ring.completion_fd().expect("a descriptor").as_raw_fd();
        let armed = ring.arm();
        assert!(armed, "there is nothing to do");
        let again = ring.completion_fd().expect("a descriptor");
        assert_eq!(again.as_raw_fd(), fd, "it is the same one while the packet waits");
        assert!(!is_readable(again, Duration::from_millis(100)), "it cannot be delivered");
        let wakeups = ring.stats().device_wakeups - before.device_wakeups;
        assert!(wakeups < 5, "{wakeups} wake-ups in 100 ms");
        assert_eq!(kernel_counts("t0").sent, 1, "the next one stays in the TAP");
        world.post(&mut ring, 14, PAGE);
        let group = world.expect(&mut ring, &long);
        assert_eq!(lengths(&group), parts_of(LONGEST, PAGE));
        assert_eq!((group[0].0, ring.stats().bounced_reads), (0, 17));
        // One read holds what waits, if not everything.
        world.post(&mut ring, 1, PAGE);
        assert_eq!(lengths(&world.expect(&mut ring, &short)), [60]);
        assert_eq!(world.too_few(), 0);
    });
}

/// Goal: a guest whose buffers can never hold a packet loses it, and gets the next one. Method: a ring
/// that is full, and one whose guest posts no more.
#[test]
fn a_packet_that_never_fits_is_dropped_and_counted() {
    every_engine(|engine, way, poller| {
        for depth in [4, 64] {
            let mut world = World::new(engine, 1500, true);
            let mut ring = world.builder(depth).drive(way.drive(poller)).build().expect("a ring");
            world.post(&mut ring, 4, PAGE);
            let short = packet(2, 1514);
            for packet in [&packet(1, LONGEST), &short] {
                world.sender.send(packet);
            }
            if way == Way::Inline {
                eventually("the queue takes the first one", || {
                    drive_to_rest(&mut ring);
                    kernel_counts("t0").sent > 0
                });
                // A ring that is full does not wait for reads.
                let _ = ring.arm();
                assert_eq!(ring.next_deadline().is_some(), depth > 4);
            }
            let group = world.expect(&mut ring, &short);
            assert_eq!((group, world.too_few()), (vec![(0, 1514)], 1), "depth {depth}");
            ring.close().expect("it closes");
            world.interface.stop(LONG).expect("it stops");
            assert_eq!(world.too_few(), 1);
        }
    });
}

/// Goal: a packet that needs more reads than one packet can have is dropped at once, though the ring is not
/// full.
#[test]
fn a_packet_for_more_reads_than_one_can_fill_is_dropped() {
    // A packet fills at most 256 reads and 256 pieces. Other buffers here have up to six pieces.
    for (in_one_piece, behind) in [(0, 280), (256, 24)] {
        in_namespace(move || {
            let mut world = World::with_buffers(TapEngine::Plain, 300, 1500, true);
            let builder = world.builder(512).drive(vmring::Drive::Inline);
            let mut ring = builder.build().expect("a ring");
            // Each has space for a packet of 60 bytes, and the first 256 not for the longest one.
            world.post_pieces(&mut ring, in_one_piece, 100);
            world.post(&mut ring, behind, 100);
            let short = packet(2, 60);
            for packet in [&packet(1, LONGEST), &short] {
                world.sender.send(packet);
            }
            eventually("the first one is taken", || {
                drive_to_rest(&mut ring);
                kernel_counts("t0").sent > 0
            });
            let _ = ring.arm();
            assert_eq!(ring.next_deadline(), None, "it waits");
            assert_eq!(world.expect(&mut ring, &short), [(0, 60)]);
            assert_eq!(world.too_few(), 1);
        });
    }
}

/// Goal: whatever ends the reads that are too few for a packet ends them once, and loses the packet only
/// with the queue, counted. After a cancel and a drain it arrives.
#[test]
fn a_packet_that_waits_outlives_its_reads_and_not_its_queue() {
    fn ended(world: &mut World, ring: &mut Ring) -> Vec<(RingOp, Result<usize, EntryError>)> {
        let take = |done: Completion| {
            world.guest.free(done.user_data);
            (done.op, done.result)
        };
        ring.reap().map(take).collect()
    }
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, true);
        let mut ring = world.builder(64).drive(way.drive(poller)).build().expect("a ring");
        let long = packet(1, LONGEST);
        let cancelled = (RingOp::Read, Err(EntryError::Cancelled));
        for round in 1..=2 {
            world.post(&mut ring, 2, PAGE);
            world.sender.send(&long);
            world.until_taken(&mut ring, round);
            let count = match round {
                1 => ring.cancel_and_wait(LONG),
                _ => ring.drain(LONG),
            };
            assert_eq!(count.expect("they come back"), 2);
            assert_eq!(ended(&mut world, &mut ring), [cancelled; 2]);
            ring.resume();
            // However long the guest has posted nothing: two reads are too few again, but only now.
            std::thread::sleep(Duration::from_millis(if round == 2 { 1200 } else { 0 }));
            world.post(&mut ring, 2, PAGE);
            drive_to_rest(&mut ring);
            std::thread::sleep(Duration::from_millis(20));
            world.post(&mut ring, 15, PAGE);
            assert_eq!(world.expect(&mut ring, &long).len(), 17);
        }
        assert_eq!(world.too_few(), 0);
        stage(format!("{engine}, {way:?}: a restart"));
        world.post(&mut ring, 2, PAGE);
        world.sender.send(&long);
        world.until_taken(&mut ring, 3);
        std::thread::scope(|scope| {
            let restart = scope.spawn(|| world.interface.restart(LONG));
            eventually("they come back", || {
                drive_to_rest(&mut ring);
                ring.ready() == 2 && restart.is_finished()
            });
            restart.join().expect("no panic").expect("it starts again");
        });
        assert_eq!(ended(&mut world, &mut ring), [cancelled; 2]);
        assert_eq!(world.too_few(), 1);
        world.sender = Sender::on("t0");
        world.post(&mut ring, 2, PAGE);
        eventually("the queue is open again", || {
            drive_to_rest(&mut ring);
            ring.stats().restarts == 1
        });
        world.sender.send(&long);
        world.until_taken(&mut ring, 1);
        stage(format!("{engine}, {way:?}: a close"));
        ring.close().expect("it closes");
        let closed = ended(&mut world, &mut ring);
        assert!(matches!(closed[..], [(_, Err(_)), (_, Err(_))]), "{closed:?}");
        assert_eq!((world.too_few(), world.guest.table().slots_in_use()), (2, 0));
    });
}

/// Goal: a frame may be among the reads that a packet fills.
#[test]
fn a_packet_goes_on_in_a_frame() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, false);
        let mut ring = world.builder(8).drive(way.drive(poller)).build().expect("a ring");
        world.post(&mut ring, 1, 500);
        let frame = ring.alloc().expect("a frame");
        ring.submit_read(frame, 100).expect("a credit");
        let packet = packet(1, 1514);
        world.sender.send(&packet);
        assert_eq!(ring.wait(2, Some(LONG)), 2);
        let mut parts: Vec<_> =
            ring.reap().map(|done| (done.more, done.result, done.take_frame())).collect();
        let (last, first) = (parts.pop().expect("two"), parts.pop().expect("two"));
        assert_eq!((first.0, first.1, last.0, last.1), (1, Ok(488), 0, Ok(1026)));
        let (header, bytes) = world.guest.bytes(0, 488);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        let frame = last.2.expect("its frame");
        assert!([&bytes[..], &frame].concat() == packet);
    });
}

/// Goal: whatever the sizes are, every packet arrives once, whole and in order, and none is dropped.
#[test]
fn packets_of_all_sizes_arrive_whole_and_in_order() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, true);
        let mut ring = world.builder(64).drive(way.drive(poller)).build().expect("a ring");
        let mut dice = Dice::new(3);
        let (mut sent, mut seen) = (Vec::new(), 0);
        while seen < scaled(200) as usize {
            for _ in 0..dice.below(5) {
                let len = match dice.below(4) {
                    0 => 9201 + dice.below(LONGEST as u64 - 9200) as usize,
                    _ => 60 + dice.below(1455) as usize,
                };
                sent.push(packet(sent.len() as u64, len));
                world.sender.send(&sent[sent.len() - 1]);
            }
            // At times they are too few. In the end they are enough for every packet.
            let room = 64 - ring.in_flight() as u64;
            let count = if dice.below(3) == 0 { room } else { dice.below(room + 1) };
            for _ in 0..count {
                world.post(&mut ring, 1, PAGE - dice.below(1000) as u32);
            }
            ring.wait(1, Some(Duration::from_millis(1)));
            for group in arrivals(&mut ring) {
                world.check(&group, &sent[seen]);
                seen += 1;
            }
        }
        assert_eq!(world.interface.drops().iter().map(|(_, count)| count).sum::<u64>(), 0);
    });
}

/// Goal: a read in several pieces of a guest's memory is filled without a copy on a ring without
/// mergeable reads too, between others that are in one piece.
#[test]
fn a_buffer_of_several_pieces_is_filled_without_a_copy() {
    every_engine(|engine, way, poller| {
        let mut world = World::new(engine, 1500, false);
        let ring = world.builder(32).mergeable_reads(false).drive(way.drive(poller)).build();
        let mut ring = ring.expect("a ring");
        let longest = world.interface.capabilities().max_packet_size + HEADER;
        world.post(&mut ring, 32, longest);
        for number in 0..scaled(200) {
            let packet = packet(number, 60 + (number as usize * 97) % 1455);
            world.sender.send(&packet);
            assert_eq!(world.expect(&mut ring, &packet), [(number, packet.len())]);
            world.post(&mut ring, 1, longest);
        }
        assert_eq!(ring.cancel_and_wait(LONG).expect("they come back"), 32);
        assert_eq!(ring.stats().bounced_reads, 0);
    });
}

/// Memory of a guest that tells when it is gone.
struct Watched {
    start: NonNull<u8>,
    gone: Arc<AtomicBool>,
}

impl Watched {
    const LEN: usize = 0x4_0000;

    fn new(gone: &Arc<AtomicBool>) -> Self {
        Self { start: map(std::ptr::null_mut(), 0).expect("memory"), gone: gone.clone() }
    }
}

/// Maps as many bytes, at this address if it is not null. They are zero.
fn map(at: *mut libc::c_void, flags: libc::c_int) -> Option<NonNull<u8>> {
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: no flag replaces a mapping that is there.
    let start = unsafe { libc::mmap(at, Watched::LEN, access, flags, -1, 0) };
    NonNull::new(start.cast()).filter(|_| start != libc::MAP_FAILED)
}

/// Unmaps what `map` has mapped.
fn unmap(start: NonNull<u8>) {
    // SAFETY: the callers give up what they have mapped.
    let done = unsafe { libc::munmap(start.as_ptr().cast(), Watched::LEN) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

// SAFETY: the address names memory of the process, which every thread may use.
unsafe impl Send for Watched {}
// SAFETY: as above.
unsafe impl Sync for Watched {}

// SAFETY: the bytes are mapped from `new` to `drop`, and nobody makes references to them.
unsafe impl GuestMapping for Watched {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn len(&self) -> usize {
        Self::LEN
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        unmap(self.start);
    }
}

/// Goal: memory that everybody has let go of stays mapped while the kernel may still write to it, by a
/// read of io_uring that is under way, and it is unmapped after that. Otherwise a packet would be written
/// to whatever is mapped there next. Method: a multishot read that has already brought a packet, so the
/// other posted buffers are the kernel's. The ring is closed, or dropped without that. Then something else
/// is mapped at that address, and packets come.
#[test]
fn memory_stays_until_a_read_under_way_has_ended() {
    in_namespace(|| {
        if TapEngine::Auto.resolve().expect("an engine") != TapEngine::IoUring {
            return crate::netns::skip("no io_uring on this kernel");
        }
        const READS: u64 = 32;
        for closed in [true, false] {
            stage(if closed { "closed" } else { "dropped" });
            let mut world = World::new(TapEngine::IoUring, 1500, false);
            let gone = Arc::new(AtomicBool::new(false));
            let watched = Watched::new(&gone);
            let address = watched.start;
            let memory = GuestMemory::new([GuestRegion::new(0, Arc::new(watched))]);
            let table = SegmentTable::new(memory.expect("a region"), 256).expect("a table");
            let ring = world.interface.ring(Direction::Read).read_depth(READS as u32).frames(4);
            let mut ring = ring.segment_table(&table).build().expect("a ring");
            for number in 0..READS {
                let buffer = table.buffer([(number * 0x1000, 0x800)], HEADER).expect("memory");
                ring.submit_read_guest(buffer, number).expect("a credit");
            }
            drop(table);
            world.sender.send(&packet(0, 500));
            assert!(ring.wait(1, Some(LONG)) > 0, "nothing comes: {:?}", world.interface.drops());
            let done: Vec<_> = ring.reap().map(|done| (done.user_data, done.result)).collect();
            assert_eq!(done, [(0, Ok(500))]);
            assert_eq!(ring.stats().bounced_reads, 0, "the kernel has written it there");
            let counters = world.interface.counters();
            assert!(counters.contains(&("io_uring", 1)), "{counters:?}");
            assert!(counters.contains(&("io_uring fallbacks", 0)), "{counters:?}");
            assert!(!gone.load(Ordering::SeqCst), "the kernel has {} buffers there", READS - 1);

            if closed {
                ring.close().expect("it ends");
                assert!(!gone.load(Ordering::SeqCst), "the completions have their buffers");
                let cancelled = ring.reap().filter(|done| done.result.is_err()).count();
                assert_eq!(cancelled as u64, READS - 1);
            }
            drop(ring);
            eventually("it is unmapped", || gone.load(Ordering::SeqCst));
            // Another thread of this process may have been faster. Then there is nothing to look at.
            let other = map(address.as_ptr().cast(), libc::MAP_FIXED_NOREPLACE);
            let mut second = None;
            eventually("there is another ring", || {
                second = world.builder(READS as u32).mergeable_reads(false).build().ok();
                second.is_some()
            });
            let mut second = second.expect("a ring");
            let longest = world.interface.capabilities().max_packet_size + HEADER;
            world.post_pieces(&mut second, READS, longest);
            for number in 1..=READS {
                let packet = packet(number, 500);
                world.sender.send(&packet);
                world.expect(&mut second, &packet);
            }
            if let Some(other) = other {
                // SAFETY: the bytes are mapped, and nobody else has their address.
                let bytes = unsafe { std::slice::from_raw_parts(other.as_ptr(), Watched::LEN) };
                assert!(bytes.iter().all(|byte| *byte == 0), "a packet went to other memory");
                unmap(other);
            }
            drop(second);
            drop(world);
            eventually("the TAP is gone", || sh("ip -o link show type tun").is_empty());
        }
    });
}
