//! The memory that a front end shares.

use std::fs::File;
use std::io::pipe;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vmring_core::guest::GuestMemoryError;
use vmring_virtio::vhost_user::{Error, MapError, MappingObserver, Settings};

use crate::frontend::*;
use crate::harness::*;

/// Goal: what the device reads and writes at a guest's address is what the front end has at that
/// place of its file, whatever the offset in the file.
#[test]
fn a_guests_memory_is_the_front_ends_file() {
    for offset in [0, 0x1000, 0x5c_e300, 0x123, 0x10_0001] {
        let file = memory(offset + SIZE);
        let mut harness = Harness::new();
        let region = Region { mmap_offset: offset, ..region() };
        harness.tell(Sent::table(&[region]).with(&file));
        let guest = harness.session.backend().memory.clone().expect("a memory");
        for (at, byte) in [(0, 1u8), (0x777, 2), (SIZE - 1, 3)] {
            file.write_all_at(&[byte], offset + at).expect("the file is written");
            let slice = guest.slice(GUEST + at, 1).expect("it is in the memory");
            assert_eq!(slice.read::<1>(), Some([byte]));
            slice.copy_from(&[byte + 100]);
            let mut found = [0];
            file.read_exact_at(&mut found, offset + at).expect("the file is read");
            assert_eq!(found, [byte + 100], "offset {offset:#x}");
            let by_user = guest.slice_of_user(USER + at, 1).expect("it is in the memory");
            assert_eq!(by_user.guest_address(), GUEST + at);
        }
        assert!(guest.slice(GUEST + SIZE, 1).is_none());
        drop(guest);
        harness.end();
    }
}

/// Goal: memory that cannot be what the front end says is refused, each by its own reason, and every
/// descriptor is closed.
#[test]
fn memory_that_is_none_is_refused() {
    type Expected = fn(&Error) -> bool;
    type Row = (&'static str, Vec<(Region, File)>, Expected);
    let whole = region();
    let next = Region { guest_address: GUEST + SIZE, user_address: USER + SIZE, ..whole };
    let file = || memory(SIZE);
    let fd = |fd: std::os::fd::OwnedFd| File::from(fd);
    let (reader, _) = pipe().expect("a pipe");
    let (_, writer) = pipe().expect("a pipe");
    let (socket, _other) = UnixStream::pair().expect("sockets");
    let folder = File::open(std::env::temp_dir()).expect("a folder");
    let not_memory: Expected =
        |error| matches!(error, Error::Map { source: MapError::NotMemory { .. }, .. });
    let short: Expected =
        |error| matches!(error, Error::Map { source: MapError::TooShort { .. }, .. });
    let overlap: Expected =
        |error| matches!(error, Error::Memory { source: GuestMemoryError::Overlap { .. }, .. });
    let too_much: Expected =
        |error| matches!(error, Error::Map { source: MapError::TooMuch { .. }, .. });
    let rows: Vec<Row> = vec![
        ("a pipe to read", vec![(whole, fd(reader.into()))], not_memory),
        ("a pipe to write", vec![(whole, fd(writer.into()))], not_memory),
        ("a socket", vec![(whole, fd(socket.into()))], not_memory),
        ("a folder", vec![(whole, folder)], not_memory),
        ("a device", vec![(whole, File::open("/dev/zero").expect("a device"))], not_memory),
        ("a file that is too short", vec![(whole, memory(SIZE - 1))], short),
        ("an empty file", vec![(whole, memory(0))], short),
        ("an offset behind the file", vec![(Region { mmap_offset: 1, ..whole }, file())], short),
        (
            "an offset that overflows",
            vec![(Region { mmap_offset: u64::MAX - SIZE + 2, ..whole }, file())],
            |error| matches!(error, Error::Map { source: MapError::Overflow { .. }, .. }),
        ),
        ("a size that overflows", vec![(Region { size: u64::MAX, ..whole }, file())], too_much),
        ("no bytes", vec![(Region { size: 0, ..whole }, file())], |error| {
            matches!(
                error,
                Error::Memory { source: GuestMemoryError::Empty { .. }, .. }
                    | Error::Map { source: MapError::System(_), .. }
            )
        }),
        ("a file that cannot be written", vec![(whole, read_only())], |error| {
            matches!(error, Error::Map { source: MapError::System(_), .. })
        }),
        ("the same region twice", vec![(whole, file()), (whole, file())], overlap),
        (
            "guest addresses that overlap",
            vec![(whole, file()), (Region { guest_address: GUEST + SIZE - 1, ..next }, file())],
            overlap,
        ),
        (
            "user addresses that overlap",
            vec![(whole, file()), (Region { user_address: USER + SIZE - 1, ..next }, file())],
            overlap,
        ),
        (
            "guest addresses beyond 64 bits",
            vec![(Region { guest_address: u64::MAX - 8, ..whole }, file())],
            |error| {
                matches!(error, Error::Memory { source: GuestMemoryError::Overflow { .. }, .. })
            },
        ),
        ("a second region that is none", vec![(whole, file()), (next, memory(0))], short),
    ];
    for (name, regions, expected) in rows {
        let mut harness = Harness::running();
        let descriptions: Vec<_> = regions.iter().map(|(region, _)| *region).collect();
        let mut message = Sent::table(&descriptions).need_reply();
        for (_, file) in &regions {
            message = message.with(file);
        }
        let error = harness.refused(message);
        assert!(expected(&error), "{name}: {error:?}");
        assert_eq!(harness.frontend.reply().number(), 1, "{name}");
        // The device has not heard of it: its rings and its memory are those from before.
        assert!(harness.calls().is_empty(), "{name}");
        harness.end();
        for (_, file) in regions.iter().filter(|(_, file)| !is_shared(file)) {
            assert!(matches!(copies(file), None | Some(1)), "{name}: a copy is left");
        }
    }
}

/// A file or folder that the rest of the process may have open too.
fn is_shared(file: &File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let kind = file.metadata().expect("metadata").file_type();
    kind.is_char_device() || kind.is_dir()
}

fn read_only() -> File {
    let path = std::env::temp_dir().join(format!("vmring-read-only-{}", std::process::id()));
    std::fs::write(&path, vec![0; SIZE as usize]).expect("a file");
    let file = File::open(&path).expect("the file");
    std::fs::remove_file(&path).expect("the file's name");
    file
}

/// Goal: regions come and go one by one, up to the slots that are offered, and are found by what the
/// document says: both addresses and the size.
#[test]
fn regions_are_added_and_removed_up_to_the_slots() {
    let mut harness = Harness::new();
    let offered = harness.number(Sent::new(GET_PROTOCOL_FEATURES, []));
    harness.tell(Sent::number(SET_PROTOCOL_FEATURES, offered));
    let slots = harness.number(Sent::new(GET_MAX_MEM_SLOTS, []));
    let page = 0x1_0000;
    let file = memory(page);
    let at = |slot: u64| Region {
        guest_address: slot * page,
        size: page,
        user_address: USER + slot * page,
        mmap_offset: 0,
    };
    for slot in 0..slots {
        harness.tell(Sent::region(ADD_MEM_REG, at(slot)).with(&file));
    }
    let calls = harness.calls();
    assert_eq!(calls.last(), Some(&Call::Memory { regions: slots as usize, sealed: false }));
    // The offset does not matter, and old front ends send a descriptor.
    let removed = Region { mmap_offset: 77, ..at(3) };
    harness.tell(Sent::region(REM_MEM_REG, removed).with(&file));
    harness.tell(Sent::region(REM_MEM_REG, at(4)));
    harness.tell(Sent::region(ADD_MEM_REG, at(3)).with(&file));
    harness.tell(Sent::region(ADD_MEM_REG, at(4)).with(&file));
    let error = harness.refused(Sent::region(ADD_MEM_REG, at(slots)).with(&file));
    assert!(matches!(error, Error::Regions { count: 510, max: 509, .. }), "{error}");
    assert_eq!(harness.session.end(), std::task::Poll::Ready(()));
    harness.session.backend_mut().memory = None;
    assert!(matches!(copies(&file), None | Some(1)));

    for wrong in [
        Region { guest_address: 1, ..region() },
        Region { user_address: 1, ..region() },
        Region { size: 1, ..region() },
    ] {
        let mut harness = Harness::running();
        let error = harness.refused(Sent::region(REM_MEM_REG, wrong));
        assert!(matches!(error, Error::UnknownRegion { .. }), "{error}");
        harness.end();
    }
}

/// Goal: one front end cannot use up the address space of all.
#[test]
fn the_memory_of_a_connection_is_limited() {
    let mut settings = settings();
    settings.memory_max = 3 * SIZE;
    let mut harness = Harness::with(settings, Device::default());
    harness.negotiate(FEATURES);
    let at = |n: u64| Region {
        guest_address: GUEST + n * SIZE,
        user_address: USER + n * SIZE,
        ..region()
    };
    harness.tell(Sent::region(ADD_MEM_REG, at(1)).with(&harness.memory));
    harness.tell(Sent::region(ADD_MEM_REG, at(2)).with(&harness.memory));
    let error = harness.refused(Sent::region(ADD_MEM_REG, at(3)).with(&harness.memory));
    let Error::Map { source: MapError::TooMuch { max }, .. } = error else { panic!("{error:?}") };
    assert_eq!(max, 3 * SIZE);
    harness.end();
}

/// Keeps the ranges that are mapped, and takes no more than a number of them.
#[derive(Default)]
struct Ranges {
    now: Mutex<Vec<(usize, usize)>>,
    max: usize,
}

impl MappingObserver for Ranges {
    fn mapped(&self, start: usize, len: usize) -> bool {
        let mut now = self.now.lock().expect("no test has panicked here");
        let room = now.len() < self.max;
        if room {
            now.push((start, len));
        }
        room
    }

    fn unmapped(&self, start: usize, len: usize) {
        let mut now = self.now.lock().expect("no test has panicked here");
        let found = now.iter().position(|range| *range == (start, len));
        now.swap_remove(found.expect("only what was mapped is unmapped"));
    }
}

impl Ranges {
    fn settings(max: usize) -> (Arc<Self>, Settings) {
        let ranges = Arc::new(Self { max, ..Self::default() });
        let mut settings = settings();
        settings.observer = Some(ranges.clone());
        (ranges, settings)
    }

    fn len(&self) -> usize {
        self.now.lock().expect("no test has panicked here").len()
    }
}

/// Goal: an observer knows, in whole pages, every address of a front end's files, the dirty log's
/// too, from before the device has the memory until nothing accesses it.
#[test]
fn an_observer_knows_what_is_mapped() {
    let (ranges, settings) = Ranges::settings(3);
    let mut harness = Harness::with(settings, Device::default());
    harness.negotiate(LOGGED);
    assert_eq!(ranges.len(), 1);
    let log = memory(1 << 16);
    let set_log = Sent::new(SET_LOG_BASE, u64s(&[1 << 15, 0x123])).with(&log);
    assert_eq!(harness.number(set_log), 0);
    let add = Region { guest_address: 1 << 29, user_address: 1 << 40, mmap_offset: 1, ..region() };
    let longer = memory(SIZE + 1);
    harness.tell(Sent::region(ADD_MEM_REG, add).with(&longer));
    assert_eq!(ranges.len(), 3);
    let guest = harness.session.backend().memory.clone().expect("a memory");
    for (address, last) in [(GUEST, GUEST + SIZE - 1), (1 << 29, (1 << 29) + SIZE - 1)] {
        for address in [address, last] {
            let slice = guest.slice(address, 1).expect("it is in the memory");
            let host = slice.as_ptr().addr();
            let now = ranges.now.lock().expect("no test has panicked here");
            let known = now.iter().filter(|(start, len)| (*start..start + len).contains(&host));
            assert_eq!(known.count(), 1, "{address:#x}");
            assert!(now.iter().all(|(start, len)| start % 4096 == 0 && len % 4096 == 0));
        }
    }

    // Another memory cannot be observed, and is refused. What was there stays until the end.
    let error = harness.refused(Sent::table(&[region()]).with(&harness.memory));
    assert!(matches!(error, Error::Map { source: MapError::Unobserved, .. }), "{error}");
    assert_eq!(ranges.len(), 3);
    drop(guest);
    harness.end();
    assert_eq!(ranges.len(), 0);

    // A table that is replaced is observed until it is.
    let (ranges, settings) = Ranges::settings(2);
    let mut harness = Harness::with(settings, Device::default());
    harness.negotiate(FEATURES);
    for _ in 0..3 {
        harness.tell(Sent::table(&[region()]).with(&harness.memory));
        harness.session.backend_mut().calls.clear();
        assert_eq!(ranges.len(), 1);
    }
    harness.end();
    assert_eq!(ranges.len(), 0);
}

/// Goal: a file that can be sealed against shrinking is sealed, the device and the counters tell whether
/// the front end can shorten one, and where seals are demanded, such a file is refused.
/// Method: memory files as front ends make them. `MFD_ALLOW_SEALING` and no seal is what a front end has
/// that left them to others; without it the file has `F_SEAL_SEAL` from its beginning, as those of
/// cloud-hypervisor and DPDK have, and as every file of a tmpfs has (QEMU's `memory-backend-file`).
#[cfg(target_os = "linux")]
#[test]
fn seals_are_reported_and_demanded() {
    let sealable = libc::MFD_ALLOW_SEALING;
    let qemu = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let full = libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let kinds = [
        ("sealed", true, memfd(SIZE, sealable, qemu)),
        ("sealable", true, memfd(SIZE, sealable, 0)),
        ("sealed against growing", true, memfd(SIZE, sealable, libc::F_SEAL_GROW)),
        ("no more seals", false, memfd(SIZE, sealable, full)),
        ("not sealable", false, memfd(SIZE, 0, 0)),
        ("not a memory file", false, Ok(memory(SIZE))),
    ];
    for (kind, is_sealed, file) in kinds {
        let file = &file.expect("a memory file");
        let mut harness = Harness::new();
        harness.tell(Sent::table(&[region()]).with(file));
        assert_eq!(harness.calls(), [Call::Memory { regions: 1, sealed: is_sealed }], "{kind}");
        assert_eq!(harness.session.stats().unsealed, u64::from(!is_sealed), "{kind}");
        // SAFETY: the call takes numbers only.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let can_shrink = seals < 0 || seals & libc::F_SEAL_SHRINK == 0;
        assert_eq!(can_shrink, !is_sealed, "{kind}: {seals:#x}");
        harness.end();

        let mut harness = Harness::with(settings_with_seals(), Device::default());
        let message = Sent::table(&[region()]).with(file);
        if is_sealed {
            harness.tell(message);
        } else {
            let error = harness.refused(message);
            assert!(matches!(error, Error::Map { source: MapError::NotSealed, .. }), "{error}");
        }
        harness.end();

        // A log that can be shortened is as bad.
        let mut harness = Harness::with(settings_with_seals(), Device::default());
        harness.negotiate_on(LOGGED, &memfd(SIZE, sealable, qemu).expect("a memory file"));
        let set_log = Sent::new(SET_LOG_BASE, u64s(&[SIZE, 0])).with(file);
        if is_sealed {
            assert_eq!(harness.number(set_log), 0);
        } else {
            let error = harness.refused(set_log);
            assert!(matches!(error, Error::Map { source: MapError::NotSealed, .. }), "{error}");
        }
        harness.end();
    }
}

/// Goal: the seal that is added takes nothing from a front end but a shorter file. It may still grow it,
/// and give pages back (a balloon), and the memory goes on.
#[cfg(target_os = "linux")]
#[test]
fn a_sealed_file_can_grow_and_lose_pages() {
    let file = memfd(SIZE, libc::MFD_ALLOW_SEALING, 0).expect("a memory file");
    let mut harness = Harness::new();
    harness.tell(Sent::table(&[region()]).with(&file));
    let refused = file.set_len(SIZE - 0x1000).expect_err("it is sealed");
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    file.set_len(SIZE + 0x1000).expect("it may grow");
    file.write_all_at(&[7; 8], 0).expect("it is written");
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes numbers only.
    let punched = unsafe { libc::fallocate(file.as_raw_fd(), hole, 0, 0x1000) };
    assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
    let guest = harness.session.backend().memory.clone().expect("a memory");
    assert_eq!(guest.slice(GUEST, 8).expect("it is in the memory").read(), Some([0; 8]));
    harness.end();
}

#[cfg(target_os = "linux")]
fn settings_with_seals() -> Settings {
    let mut settings = settings();
    settings.demand_seals = true;
    settings
}

/// Goal: a file of huge pages is mapped and unmapped in its own pages, though the region begins
/// between two of them.
#[cfg(target_os = "linux")]
#[test]
fn huge_pages_are_mapped_in_their_own_size() {
    let huge = 2 << 20;
    let file = match memfd(2 * huge, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, 0) {
        Ok(file) => file,
        Err(error) => return println!("skipped: no huge pages: {error}"),
    };
    let mut harness = Harness::new();
    let region = Region { mmap_offset: huge + 0x3000, ..region() };
    harness.frontend.send(&Sent::table(&[region]).with(&file));
    match harness.session.process() {
        Ok(_) => {}
        Err(Error::Map { source: MapError::System(error), .. }) => {
            // An emulator with pages of its own size maps no huge ones.
            let is_emulated = std::env::var_os("VMRING_TEST_PAGE_SIZE").is_some();
            let why = error.raw_os_error();
            let none = why == Some(libc::ENOMEM) || is_emulated && why == Some(libc::EINVAL);
            assert!(none, "{error}");
            return println!("skipped: no huge page can be mapped: {error}");
        }
        Err(error) => panic!("{error:?}"),
    }
    let guest = harness.session.backend().memory.clone().expect("a memory");
    guest.slice(GUEST + SIZE - 4, 4).expect("its end").copy_from(b"here");
    drop(guest);
    harness.end();
    assert_eq!(copies(&file), Some(1), "it is unmapped");
}
