//! The dirty log of a live migration.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vmring_virtio::vhost_user::Error;
use vmring_virtio::vhost_user::features::ProtocolFeature;

use crate::frontend::*;
use crate::harness::*;

/// A log of 64 KiB covers 2 GiB.
const LOG: u64 = 1 << 16;

fn set_log(file: &File, offset: u64, size: u64) -> Sent {
    Sent::new(SET_LOG_BASE, u64s(&[size, offset])).with(file)
}

/// The pages whose bits are set.
fn dirty(file: &File, offset: u64, size: u64) -> Vec<u64> {
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, offset).expect("the log");
    (0..size * 8).filter(|page| bytes[(page / 8) as usize] & (1 << (page % 8)) != 0).collect()
}

/// Goal: each page of what was written has its bit, and no other has, whatever the alignment of the
/// log and of the write. A write behind the log's end changes nothing behind it.
#[test]
fn pages_that_were_written_have_their_bits() {
    for offset in [0, 4096, 1, 2, 3, 5, 4095, 12_345] {
        for size in [LOG, 31, 30, 33] {
            let log = memory(offset + size + 16);
            let mut harness = Harness::new();
            harness.negotiate(LOGGED);
            let guest_end = size * 8 * 4096;
            if guest_end < GUEST + SIZE {
                // The log must cover all memory.
                let error = harness.refused(set_log(&log, offset, size));
                assert!(matches!(error, Error::LogTooShort { .. }), "{error}");
                harness.end();
                continue;
            }
            assert_eq!(harness.number(set_log(&log, offset, size)), 0);
            let guest = harness.session.backend().memory.clone().expect("a memory");
            assert!(dirty(&log, offset, size).is_empty());
            for (address, len, pages) in [
                (GUEST, 1, 16..17),
                (GUEST + 0x1fff, 1, 17..18),
                (GUEST + 0x2fff, 2, 18..20),
                (GUEST + 0x5000, 0x1000, 21..22),
                (GUEST + 0x8000, 0x4_0001, 24..89),
                (GUEST + SIZE - 1, 1, 271..272),
            ] {
                let before = dirty(&log, offset, size);
                let slice = guest.slice(address, len).expect("it is in the memory");
                slice.mark_dirty(len);
                let after = dirty(&log, offset, size);
                let new: Vec<_> = after.iter().filter(|page| !before.contains(page)).collect();
                assert!(new.iter().all(|page| pages.contains(*page)), "{address:#x} {new:?}");
                assert!(pages.clone().all(|page| after.contains(&page)), "{address:#x}");
                slice.mark_dirty(0);
            }
            // Nothing around the log has changed.
            let mut around = vec![0; offset as usize];
            log.read_exact_at(&mut around, 0).expect("before the log");
            assert!(around.iter().all(|byte| *byte == 0), "{offset} {size}");
            let mut behind = [0; 16];
            log.read_exact_at(&mut behind, offset + size).expect("behind the log");
            assert_eq!(behind, [0; 16], "{offset} {size}");
            drop(guest);
            harness.end();
            assert!(matches!(copies(&log), None | Some(1)));
        }
    }
}

/// Goal: a log of 34 bytes, whose size is no multiple of a word, has its last page.
#[test]
fn the_last_page_of_an_odd_log_is_logged() {
    // 272 pages: the end of the memory is at page 272.
    let (offset, size) = (7, 34);
    let log = memory(offset + size);
    let mut harness = Harness::new();
    harness.negotiate(LOGGED);
    assert_eq!(harness.number(set_log(&log, offset, size)), 0);
    let guest = harness.session.backend().memory.clone().expect("a memory");
    guest.slice(GUEST, SIZE as u32).expect("all of it").mark_dirty(SIZE as u32);
    assert_eq!(dirty(&log, offset, size), (16..272).collect::<Vec<_>>());
    drop(guest);
    harness.end();
}

/// Goal: logging is switched on and off while rings run, and a ring that runs never has the wrong one.
#[test]
fn logging_is_switched_while_rings_run() {
    let log = memory(LOG + 64);
    let mut harness = Harness::running();
    harness.session.backend_mut().taken = 1;
    assert_eq!(harness.number(set_log(&log, 0, LOG)), 0);
    assert!(harness.calls().is_empty(), "a log that is not in use changes nothing");
    let marks = |harness: &Harness| {
        let ring = &harness.session.backend().rings[&0];
        ring.memory.slice(ring.used, 4).expect("the ring").mark_dirty(4);
        if let Some(used_log) = &ring.used_log {
            used_log.mark(4, 8);
        }
        let pages = dirty(&log, 0, LOG);
        log.write_all_at(&vec![0; LOG as usize], 0).expect("the log is cleared");
        pages
    };
    assert_eq!(marks(&harness), []);
    harness.tell(Sent::number(SET_FEATURES, LOGGED));
    assert_eq!(
        harness.calls(),
        [
            Call::Stop(0),
            Call::Stop(1),
            Call::Memory { regions: 1, sealed: false },
            Call::Start { index: 0, base: 1, enabled: true },
            Call::Start { index: 1, base: 1, enabled: true },
        ]
    );
    let used = (GUEST + 0x2000) / 4096;
    assert_eq!(marks(&harness), [used], "by the memory");
    // The used ring may be logged elsewhere.
    let [descriptors, used_ring, available, _] = ring_at(0);
    let addresses = [descriptors, used_ring, available, 0x123_0ff8];
    harness.tell(Sent::addresses(0, 1, addresses));
    assert_eq!(harness.calls(), [Call::Stop(0), Call::Start { index: 0, base: 2, enabled: true }]);
    assert_eq!(marks(&harness), [used, 0x1230, 0x1231]);
    // Whatever a device says that it has written, the log's memory has an end.
    let used_log = harness.session.backend().rings[&0].used_log.clone().expect("a log");
    for (offset, len) in [(0, u64::MAX), (u64::MAX, u64::MAX), (LOG * 8 * 4096, 1), (u64::MAX, 0)] {
        used_log.mark(offset, len);
    }
    drop(used_log);
    assert_eq!(marks(&harness).last(), Some(&(LOG * 8 - 1)));
    let mut behind = [0; 64];
    log.read_exact_at(&mut behind, LOG).expect("behind the log");
    assert_eq!(behind, [0; 64]);
    harness.tell(Sent::addresses(0, 0, addresses));
    harness.tell(Sent::number(SET_FEATURES, FEATURES));
    assert_eq!(marks(&harness), []);
    // And on again, into another log.
    let other = memory(LOG);
    harness.tell(Sent::number(SET_FEATURES, LOGGED));
    assert_eq!(harness.number(set_log(&other, 0, LOG)), 0);
    assert_eq!(marks(&harness), []);
    assert_eq!(dirty(&other, 0, LOG), [used]);
    assert!(matches!(copies(&log), None | Some(1)), "the old log is closed");
    assert_eq!(harness.session.backend().rings.len(), 2);
    harness.end();
}

/// Goal: a device that starts during a migration writes nothing before it has the log: QEMU kicks the
/// rings first.
#[test]
fn rings_that_must_be_logged_wait_for_the_log() {
    let mut harness = Harness::new();
    harness.negotiate(LOGGED);
    harness.set_up(0, 0);
    assert!(harness.session.backend().rings.is_empty());
    assert_eq!(harness.number(set_log(&memory(LOG), 0, LOG)), 0);
    assert_eq!(harness.session.backend().rings.len(), 1);
    harness.end();
}

/// Goal: without LOG_SHMFD there is no log, and nothing waits for one.
#[test]
fn without_shared_memory_there_is_no_log() {
    for message in [Sent::number(SET_LOG_BASE, 0x1234), Sent::new(SET_LOG_BASE, [0; 16])] {
        let mut harness = Harness::new();
        harness.tell(Sent::number(SET_PROTOCOL_FEATURES, all_but(&[ProtocolFeature::LogShmfd])));
        harness.tell(Sent::number(SET_FEATURES, LOGGED));
        harness.tell(Sent::table(&[region()]).with(&harness.memory));
        harness.tell(message);
        harness.set_up(0, 0);
        assert_eq!(harness.session.backend().rings.len(), 1);
        harness.end();
    }
}

/// Goal: what the log does not cover is refused, when the log, the memory, the features, the size or
/// the addresses of a ring make it so.
#[test]
fn a_log_that_is_too_short_is_refused() {
    let short = |harness: &mut Harness, message: Sent| {
        let error = harness.refused(message);
        assert!(matches!(error, Error::LogTooShort { .. }), "{error}");
    };
    // 0x110 pages are needed: 34 bytes.
    let mut harness = Harness::new();
    harness.negotiate(LOGGED);
    short(&mut harness, set_log(&memory(LOG), 0, 33));

    let mut harness = Harness::negotiated();
    assert_eq!(harness.number(set_log(&memory(LOG), 0, 33)), 0);
    short(&mut harness, Sent::number(SET_FEATURES, LOGGED));

    let logged = || {
        let mut harness = Harness::new();
        harness.negotiate(LOGGED);
        assert_eq!(harness.number(set_log(&memory(LOG), 0, 34)), 0);
        harness
    };
    let next = Region { guest_address: GUEST + SIZE, user_address: USER + SIZE, ..region() };
    short(&mut logged(), Sent::region(ADD_MEM_REG, next).with(memory(SIZE)));

    let [descriptors, used, available, _] = ring_at(0);
    for log in [GUEST + SIZE, u64::MAX, GUEST + SIZE - 5] {
        let addresses = Sent::addresses(0, 1, [descriptors, used, available, log]);
        short(&mut logged(), addresses);
    }
    // The size counts too.
    let mut harness = logged();
    harness.tell(Sent::addresses(
        0,
        1,
        [descriptors, used, available, GUEST + SIZE - (6 + 8 * 256)],
    ));
    harness.tell(Sent::state(SET_VRING_NUM, 0, 256));
    harness.tell(Sent::number(SET_VRING_KICK, NO_DESCRIPTOR));
    harness.tell(Sent::state(SET_VRING_NUM, 0, 512));
    short(&mut harness, Sent::number(SET_VRING_KICK, NO_DESCRIPTOR));
}

#[test]
fn the_logs_event_is_closed() {
    let mut harness = Harness::negotiated();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    harness.tell(Sent::new(SET_LOG_FD, []).with(&writer));
    assert!(matches!(copies(&reader), None | Some(2)));
    harness.end();
}
