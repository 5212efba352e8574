//! Live migrations by a front end that copies the guest's memory itself: everything once, and then what
//! the dirty log says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};

use vmring::device::Capabilities;
use vmring::{GuestMmap, Interface};
use vmring_core::guest::{DirtyLog, GuestMemory, GuestRegion};
use vmring_core::sync::Ordering;
use vmring_virtio::net::{Features, QueueSetup};
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES};

use crate::driver::ARENA;
use crate::driver::shapes::Shape;
use crate::frontend::*;
use crate::net::basics::{one_buffer, shape};
use crate::net::guest::{Guest, Options, driver, frame, interface, layout, poll_both};
use crate::net::remote::{Remote, SIZE, Server};
use crate::net::wire::{offloading, wire};
use crate::support::{guarded, scaled};

/// A copy of a guest's memory that takes what is marked in the same moment. Whatever is written later
/// needs another mark. No front end is faster.
#[derive(Default)]
struct Follower {
    source: OnceLock<GuestMemory>,
    copy: Mutex<Vec<Vec<u8>>>,
}

impl DirtyLog for Follower {
    fn mark(&self, guest_address: u64, len: u64) {
        let source = self.source.get().expect("the memory is known");
        let mut copy = self.copy.lock().unwrap();
        for slice in source.slices(guest_address, len as u32) {
            let slice = slice.expect("what is marked is in the memory");
            let regions = source.regions().iter().zip(&mut *copy);
            for (region, bytes) in regions {
                if let Some(at) = slice.guest_address().checked_sub(region.guest_address())
                    && at < region.len()
                {
                    slice.copy_to(&mut bytes[at as usize..]);
                }
            }
        }
    }
}

impl Follower {
    fn follow(&self, memory: &GuestMemory) {
        let regions = memory.regions().iter().map(|region| region.clone().dirty_log(None));
        self.source.get_or_init(|| GuestMemory::new(regions).expect("the same regions"));
        self.copy_all();
    }

    fn now(&self) -> Vec<Vec<u8>> {
        let regions = self.source.get().expect("the memory is known").regions().iter();
        let bytes = |region: &GuestRegion| {
            let mut bytes = vec![0; region.len() as usize];
            region.get(0, region.len() as u32).expect("all of it").copy_to(&mut bytes);
            bytes
        };
        regions.map(bytes).collect()
    }

    /// Takes everything, and with it what the driver itself has written.
    fn copy_all(&self) {
        *self.copy.lock().unwrap() = self.now();
    }

    fn check(&self, what: &str) {
        let (now, copy) = (self.now(), self.copy.lock().unwrap());
        for (number, (now, copy)) in now.iter().zip(&*copy).enumerate() {
            if now != copy {
                let at = now.iter().zip(copy).position(|(now, copy)| now != copy);
                panic!("{what}: byte {at:x?} of region {number} is not in the log");
            }
        }
    }
}

/// What an interface can do, with a name.
type Way = (&'static str, fn(&mut Capabilities));

/// Receives packets of these lengths into buffers of these shapes, and sends as many.
fn follow(
    what: &str,
    ends: [Interface; 2],
    without: [Features; 2],
    shapes: &[Shape],
    lens: &[usize],
) {
    let follower = Arc::new(Follower::default());
    let log: Arc<dyn DirtyLog> = follower.clone();
    let [a, b] = ends;
    let options = |without, dirty_log| {
        let mut options = Options { without, dirty_log, ..Options::default() };
        options.settings.control_queue = true;
        options
    };
    let mut a = Guest::with(a, &options(without[0], None));
    let memory = crate::net::guest::memory(Some(log.clone()));
    follower.follow(&memory);
    let mut b = Guest::over(b, &options(without[1], Some(log)), memory);
    let accepted = b.device.accepted_features();
    let mut commands = driver(&b.memory, 2, 16, accepted, 0).with_arena(ARENA + 0x70_0000);
    b.device.start_queue(2, QueueSetup::new(layout(2, 16))).unwrap();
    a.fill(&one_buffer(65562), 8);
    let mut came = 0;
    for shape in shapes {
        for (number, len) in lens.iter().enumerate() {
            let what = format!("{what}, {}, {len} bytes", shape.name);
            b.fill(shape, 50);
            follower.copy_all();
            a.send(&a.frame_to(b.mac(), *len, number as u32));
            poll_both(&mut a, &mut b);
            poll_both(&mut a, &mut b);
            follower.check(&what);
            came += b.returned().len();
            b.send(&b.frame_to(a.mac(), *len, number as u32));
            let head = commands.post(&[(2, false), (1, false), (1, true)], None).unwrap();
            let buffers = commands.buffers(head).to_vec();
            commands.write(buffers[2].address, &[0xff]);
            commands.expose();
            follower.copy_all();
            poll_both(&mut a, &mut b);
            follower.check(&what);
            assert_eq!((b.tx.collect().len(), commands.collect().len()), (1, 1));
            // Sleeping and waking writes into the rings too.
            assert!(b.device.arm() || b.device.arm());
            b.poll();
            follower.check(&what);
            a.tx.collect();
            a.rx.collect();
            a.fill(&one_buffer(65562), 1);
        }
    }
    assert!(came >= shapes.len() * lens.len(), "{what}");
}

/// Goal: every byte that a device writes into a guest's memory is entered into the log after it was
/// written, in each way in which packets are received. Method: the whole memory is compared with one
/// that has taken what was marked in the same moment. Broken by: a missing mark, or one before the
/// write, of buffers, headers, elements, indices, wishes for kicks or answers.
#[test]
fn a_copy_that_follows_the_log_at_once_misses_no_byte() {
    let small = [one_buffer(1536), shape("netkvm, header apart"), shape("Linux, small packets")];
    let lens = [60, 1514];
    for event in [Features::EVENT_IDX, Features::NONE] {
        let both = [event; 2];
        let name = "copied by the network";
        follow(name, [0, 1].map(|_| interface("followed")), both, &small, &lens);
        let ways: [Way; 2] = [
            ("bounced", |_| {}),
            ("in place", |caps| (caps.read_segments, caps.write_segments) = (256, 256)),
        ];
        for (name, change) in ways {
            follow(name, wire(change).0, both, &small, &lens);
        }
        // Long packets over several buffers, by the interface and by the device itself. The header of a
        // packet may be in two of the parts of its first buffer.
        let parts = vec![(5, true), (7, true), (1500, true)];
        let parts = Shape { name: "a header in two parts", buffers: parts, indirect: None };
        let long = [one_buffer(1536), shape("netkvm, header apart"), parts];
        let ways: [Way; 2] = [
            ("merged by the interface", |caps| {
                caps.max_packet_size = 65550;
                (caps.read_segments, caps.write_segments) = (256, 256);
                caps.merges_reads = true;
            }),
            ("spread by the device", |caps| caps.max_packet_size = 65550),
        ];
        for (name, change) in ways {
            follow(name, wire(change).0, both, &long, &[60, 1525, 9000, 30_000]);
        }
        let refuses = [event, event | Features::GUEST_OFFLOADS];
        follow("completed by the device", wire(offloading).0, refuses, &small, &lens);
    }
}

/// The dirty log of a front end, and the pages that it has taken from it.
struct Pages {
    log: GuestMemory,
    words: u64,
}

impl Pages {
    const SHIFT: u32 = 12;

    /// Takes every bit that is set.
    fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for word in 0..self.words {
            let slice = self.log.slice(word * 4, 4).expect("the log");
            let bits = slice.atomic_u32(0).expect("aligned").swap(0, Ordering::AcqRel);
            let bits = u32::from_ne_bytes(bits.to_le_bytes().map(u8::to_le));
            pages.extend((0..32).filter(|bit| bits & 1 << bit != 0).map(|bit| word * 32 + bit));
        }
        pages
    }
}

/// Goal: a guest is copied while packets arrive, by passes that follow the log of vhost-user, and in the
/// end the copy is the guest's memory. Method: what a device writes is in pages of its own here, so the
/// copy is compared byte for byte when the rings have stopped. Broken by: a mark that is missing, of the
/// wrong page, or made before the write.
#[test]
fn a_guest_is_copied_while_packets_arrive() {
    guarded("a copy by passes", || {
        let [(_sa, socket_a), (_sb, socket_b)] = [0, 1].map(|_| Server::new(interface("passes")));
        let (mut a, mut b) =
            (Remote::new(socket_a, Features::NONE), Remote::new(socket_b, Features::NONE));
        b.post(&[12, 2000], 20);
        a.sync();
        b.sync();
        // The log covers the first 2 GiB.
        let (file, size) = (memory(1 << 16), 1u64 << 16);
        let base = Sent::new(SET_LOG_BASE, u64s(&[size, 0])).with(&file);
        b.frontend.send(&base);
        assert_eq!(b.frontend.reply().number(), 0);
        let bits = b.features.bits() | PROTOCOL_FEATURES | LOG_ALL;
        b.frontend.send(&Sent::number(SET_FEATURES, bits));
        b.sync();
        let map = GuestMmap::file(&file, 0, size as usize).expect("the log");
        let log = GuestMemory::new([GuestRegion::new(0, Arc::new(map))]).unwrap();
        let pages = Pages { log, words: size / 4 };

        let source = b.rings[0].driver.memory().clone();
        let page_len = 1u32 << Pages::SHIFT;
        let copy_page = |page: u64, copy: &mut Vec<(u64, Vec<u8>)>| {
            let slice = source.slice(page << Pages::SHIFT, page_len).expect("a page of the guest");
            let place = copy.iter_mut().find(|one| one.0 == page).expect("all pages are there");
            slice.copy_to(&mut place.1);
        };
        // Where the device writes: the used ring, and the buffers that are received into.
        let used = layout(0, SIZE).used;
        let device = |page: u64| {
            let at = page << Pages::SHIFT;
            (ARENA..ARENA + 0x10_0000).contains(&at)
        };
        let all: Vec<u64> = (source.regions().iter())
            .flat_map(|region| {
                let first = region.guest_address() >> Pages::SHIFT;
                first..first + (region.len() >> Pages::SHIFT)
            })
            .collect();
        let mut copy: Vec<_> = all.iter().map(|page| (*page, vec![0; page_len as usize])).collect();
        all.iter().for_each(|page| copy_page(*page, &mut copy));
        let mut marked = BTreeSet::new();
        for round in 0..scaled(100) as u32 {
            for number in 0..4 {
                a.send(&frame(a.mac, b.mac, 1000 + number as usize * 100, round * 4 + number));
            }
            // A pass, while they arrive.
            for page in pages.take() {
                copy_page(page, &mut copy);
                marked.insert(page);
            }
            let packets = b.receive(4);
            assert_eq!(packets.len(), 4);
            b.post(&[12, 2000], 4);
        }
        // The source stands still, and what is left is copied.
        let stopped = [b.base(0), b.base(1)];
        assert_eq!(stopped[0], b.rings[0].driver.used_index());
        for page in pages.take() {
            copy_page(page, &mut copy);
            marked.insert(page);
        }
        for (page, bytes) in &copy {
            let slice = source.slice(page << Pages::SHIFT, page_len).expect("a page of the guest");
            let mut now = vec![0; page_len as usize];
            slice.copy_to(&mut now);
            assert!(!device(*page) || now == *bytes, "page {page:#x} is another one");
        }
        // The used ring shares its page with the available ring, which the driver writes.
        let (at, len) = (used & !0xfff, 6 + 8 * u64::from(SIZE));
        let bytes = &copy.iter().find(|one| one.0 == at >> Pages::SHIFT).expect("its page").1;
        let within = (used - at) as usize..(used - at + len).min(page_len.into()) as usize;
        let mut now = vec![0; within.len()];
        source.slice(used, within.len() as u32).expect("the used ring").copy_to(&mut now);
        assert_eq!(now, bytes[within]);
        // The log has told of the packets. How many pages they are in depends on the number of rounds.
        let of_buffers = marked.iter().filter(|page| device(**page)).count();
        assert!(of_buffers > 10, "{marked:x?}");
    });
}
