//! A guest behind a TAP of the kernel: what the host sends reaches the guest's buffers with no copy but
//! the kernel's. The tests need root, and say so where they are skipped.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use vmring::device::Offloads;
use vmring::{Interface, Tap, TapEngine};
use vmring_virtio::net::Features;

use super::basics::one_buffer;
use super::guest::{Guest, HEADER, Options, frame, readable};
use crate::driver::shapes::{self, Shape};
use crate::support::{LONG, guarded};

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The header of a TCP packet that is to be cut into packets of the MTU, as the kernel writes it.
const TO_CUT: [u8; 10] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];

/// Runs `body` for each engine, in a network namespace of its own. What it is given makes an interface
/// on a TAP with offloads.
fn with_taps(what: &'static str, body: fn(&dyn Fn() -> (Interface, Sender))) {
    guarded(what, move || {
        // SAFETY: the call takes no pointer. It affects this thread and those that it starts.
        let entered = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        if !entered || !std::path::Path::new("/dev/net/tun").exists() {
            let why = "a network namespace needs root, and a TAP /dev/net/tun";
            let _ = writeln!(std::io::stderr(), "skipped: {what}: {why}");
            return;
        }
        // A kernel without IPv6 has no such file.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        for engine in [TapEngine::Plain, TapEngine::Auto] {
            body(&|| {
                let mut offloads = Offloads::default();
                (offloads.checksum, offloads.tso4, offloads.tso6) = (true, true, true);
                let tap = Tap::named("vm0").configure(false).engine(engine);
                let interface = Interface::builder().offloads(offloads).device(tap).start();
                (interface.expect("it starts"), Sender::on("vm0"))
            });
        }
    });
}

/// Sends frames on an interface of this thread's namespace, as the host's kernel does.
struct Sender(OwnedFd);

impl Sender {
    fn on(interface: &str) -> Self {
        const PACKET_VNET_HDR: libc::c_int = 15;
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just opened, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = CString::new(interface).expect("a name");
        // SAFETY: all zeroes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        // SAFETY: the name ends with a zero and lives through the call.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        let (at, len) = ((&raw const address).cast(), size_of_val(&address) as u32);
        // SAFETY: the address lives through the call.
        assert_eq!(unsafe { libc::bind(fd.as_raw_fd(), at, len) }, 0, "the interface is there");
        let on: libc::c_int = 1;
        let value = (&raw const on).cast();
        // SAFETY: the value lives through the call, and has the length that is told.
        let set = unsafe {
            libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, value, 4)
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    /// Sends a packet of this length to the guest. Returns what the guest is to get: the first ten
    /// bytes of the header, and the packet.
    fn send(&self, guest: &Guest, len: usize, number: u32) -> ([u8; 10], Vec<u8>) {
        let mut packet = frame(HOST, guest.mac(), len, number);
        let mut header = [0; 10];
        if len > 1514 {
            // IPv4 and TCP, to be cut.
            header = TO_CUT;
            packet[12..34].fill(0);
            (packet[12], packet[14], packet[23], packet[46]) = (8, 0x45, 6, 0x50);
            packet[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        }
        let bytes = [&header[..], &packet].concat();
        // SAFETY: the bytes live through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
        (header, packet)
    }
}

/// Waits for the next packet as an event loop does: sleeps until the descriptor is readable or until the
/// deadline. Returns the header, the packet, and how many buffers it filled.
fn next(guest: &mut Guest) -> ([u8; HEADER], Vec<u8>, usize) {
    let began = Instant::now();
    loop {
        let progress = guest.device.poll();
        let returned = guest.returned();
        if !returned.is_empty() {
            let bytes: Vec<u8> = returned.iter().flat_map(|(_, bytes)| bytes).copied().collect();
            let (header, packet) = bytes.split_first_chunk().expect("a header");
            return (*header, packet.to_vec(), returned.len());
        }
        assert!(began.elapsed() < LONG / 2, "nothing comes: {:?}", guest.stats());
        if !progress.again && guest.device.arm() {
            let deadline = progress.deadline.map(|at| at.saturating_duration_since(Instant::now()));
            readable(&guest.device, deadline.unwrap_or(LONG / 2) + Duration::from_millis(1));
        }
    }
}

fn shape(name: &str) -> Shape {
    shapes::all().into_iter().find(|shape| shape.name == name).expect("it is one of them")
}

/// The packets that were copied on their way to the guest, other than by the kernel.
fn copies(guest: &Guest) -> u64 {
    let ring = guest.device.ring_stats(0).expect("it runs");
    ring.bounced_reads + guest.stats().rx_copied
}

#[test]
fn a_packet_of_a_tap_is_copied_by_the_kernel_alone() {
    with_taps("packets without a copy", |tap| {
        let shapes = [
            shape("Linux, mergeable"),
            one_buffer(4096),
            shape("netkvm, header apart"),
            shape("OpenBSD, header apart"),
        ];
        for shape in shapes {
            let (interface, sender) = tap();
            let mut guest = Guest::with(interface, &Options::default());
            let size: u32 = shape.buffers.iter().map(|(len, _)| len).sum();
            // All of them are enough for the longest packet, at each packet.
            guest.fill(&shape, (3 * 65_565 / size) as usize);
            guest.poll();
            for (number, len) in (0..).zip([60, 1514, 65_535, 60]) {
                let (front, packet) = sender.send(&guest, len, number);
                let (header, bytes, count) = next(&mut guest);
                assert!(bytes == packet, "{} {len}", shape.name);
                assert_eq!(header[..10], front);
                assert_eq!(header[10..], (count as u16).to_le_bytes());
                assert_eq!(count, (len + HEADER).div_ceil(size as usize), "{} {len}", shape.name);
            }
            assert_eq!((copies(&guest), guest.stats().rx_packets), (0, 4), "{}", shape.name);
        }
    });
}

/// What a guest sends is taken out of its buffers by the kernel alone, in one piece or in several.
#[test]
fn a_packet_to_a_tap_is_copied_by_the_kernel_alone() {
    with_taps("packets to the host without a copy", |tap| {
        let (interface, _) = tap();
        let mut guest = Guest::with(interface, &Options::default());
        let received = received_by("vm0");
        let mut sent = 0;
        for len in [60, 1514] {
            for pieces in [&[u32::MAX][..], &[12], &[5, 100, 300]] {
                assert!(guest.send_in(&guest.frame_to(HOST, len, sent), pieces, None));
                sent += 1;
            }
        }
        let began = Instant::now();
        let mut ended = 0;
        while ended < sent {
            assert!(began.elapsed() < LONG / 2, "nothing is sent: {:?}", guest.stats());
            guest.poll();
            ended += guest.tx.collect().len() as u32;
        }
        let ring = guest.device.ring_stats(1).expect("it runs");
        let (stats, received) = (guest.stats(), received_by("vm0") - received);
        assert_eq!((ring.bounced_writes, stats.tx_copied, stats.tx_packets), (0, 0, 6));
        assert_eq!(received, 6);
    });
}

/// The packets that the host's end of a TAP has received.
fn received_by(interface: &str) -> u64 {
    let all = std::fs::read_to_string("/proc/thread-self/net/dev").expect("counters");
    let line = all.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let packets = line.expect("it is there").split_whitespace().nth(1);
    packets.and_then(|packets| packets.parse().ok()).expect("a number")
}

/// A guest without mergeable buffers posts chains of many pages. The kernel fills them too.
#[test]
fn a_chain_of_many_pages_is_filled_by_the_kernel_alone() {
    with_taps("big packets without a copy", |tap| {
        let (interface, sender) = tap();
        let without = Features::MRG_RXBUF | Features::EVENT_IDX;
        let mut guest = Guest::with(interface, &Options { without, ..Options::default() });
        let big = shape("Linux, big packets");
        guest.fill(&big, 8);
        for (number, len) in (0..).zip([60, 1514, 65_535]) {
            let (_, packet) = sender.send(&guest, len, number);
            let (_, bytes, count) = next(&mut guest);
            assert!(bytes == packet && count == 1, "{len}");
        }
        assert_eq!(copies(&guest), 0);
    });
}

/// A guest whose queue is too small for a packet loses it, and goes on.
#[test]
fn a_queue_that_is_too_small_for_a_packet_goes_on() {
    with_taps("a queue that is too small", |tap| {
        let (interface, sender) = tap();
        let mut guest = Guest::with(interface, &Options { size: 32, ..Options::default() });
        assert_eq!(guest.fill(&shape("Linux, mergeable"), 40), 32);
        guest.poll();
        for number in 0..20 {
            sender.send(&guest, 65_535, number);
            // The device does not wait for buffers that cannot come.
            assert_eq!(guest.device.poll().deadline, None);
            let (_, packet) = sender.send(&guest, 1514, number);
            assert_eq!(next(&mut guest).1, packet);
            guest.fill(&shape("Linux, mergeable"), 1);
        }
        let drops = guest.device.interface().drops();
        assert!(drops.contains(&("too few reads", 20)), "{drops:?}");
    });
}

/// A guest that posts few buffers, and no more, loses a packet that is longer. The next one arrives.
#[test]
fn a_guest_that_posts_few_buffers_gets_the_next_packet() {
    with_taps("few buffers", |tap| {
        let (interface, sender) = tap();
        let mut guest = Guest::with(interface, &Options::default());
        assert_eq!(guest.fill(&shape("Linux, mergeable"), 4), 4);
        guest.poll();
        sender.send(&guest, 65_535, 0);
        let (_, packet) = sender.send(&guest, 1514, 1);
        assert_eq!(next(&mut guest).1, packet);
        let drops = guest.device.interface().drops();
        assert!(drops.contains(&("too few reads", 1)), "{drops:?}");
    });
}
