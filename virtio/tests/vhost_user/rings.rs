//! What happens to rings: starts, stops, events, and the rules of a ring that runs.

use std::io::pipe;
use std::task::Poll;

use vmring_virtio::vhost_user::features::ProtocolFeature;
use vmring_virtio::vhost_user::{Error, Progress};

use crate::frontend::*;
use crate::harness::*;

/// Goal: the reply to GET_VRING_BASE comes after the device has ended its work, and no further
/// message is handled meanwhile.
#[test]
fn a_rings_base_is_told_after_the_drain() {
    let mut harness = Harness::running();
    harness.session.backend_mut().drains = 3;
    harness.session.backend_mut().taken = 5;
    harness.frontend.send(&Sent::state(GET_VRING_BASE, 0, 0));
    harness.frontend.send(&Sent::number(SEND_RARP, 0x0a00_0000_0002));
    for _ in 0..3 {
        assert_eq!(harness.process(), Progress::Draining);
        assert_eq!(harness.frontend.replied(), 0);
        assert!(harness.calls().is_empty());
    }
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(harness.frontend.reply().payload, u32s(&[0, 5]));
    assert_eq!(harness.calls(), [Call::Stop(0), Call::Announce(MAC)]);
    harness.end();
}

/// Goal: memory is taken away after the rings have stopped, and its reply comes after that.
#[test]
fn memory_is_removed_after_the_drain() {
    let mut harness = Harness::running();
    harness.session.backend_mut().drains = 2;
    let message = Sent::region(REM_MEM_REG, region()).need_reply();
    harness.frontend.send(&message);
    for _ in 0..1 {
        assert_eq!(harness.process(), Progress::Draining);
        assert_eq!(harness.frontend.replied(), 0);
        assert_ne!(copies(&harness.memory), Some(1), "it is mapped");
    }
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(harness.frontend.reply().number(), 0);
    assert_eq!(
        harness.calls(),
        [Call::Stop(0), Call::Stop(1), Call::Memory { regions: 0, sealed: true }]
    );
    assert!(matches!(copies(&harness.memory), None | Some(1)), "it is not mapped any more");
    // The same memory again: the rings go on where they were.
    harness.tell(Sent::region(ADD_MEM_REG, region()).with(&harness.memory));
    assert_eq!(harness.session.backend().rings.len(), 2);
    harness.end();
}

/// Goal: a ring that was stopped continues where it was, unless the front end says otherwise.
#[test]
fn a_stopped_ring_keeps_its_base() {
    let mut harness = Harness::negotiated();
    harness.set_up(0, 0xffff);
    harness.session.backend_mut().taken = 3;
    let reply = harness.ask(Sent::state(GET_VRING_BASE, 0, 0));
    assert_eq!(reply.payload, u32s(&[0, 2]), "indices have 16 bits");
    // It is told again, though the ring does not run.
    let reply = harness.ask(Sent::state(GET_VRING_BASE, 0, 0));
    assert_eq!(reply.payload, u32s(&[0, 2]));
    harness.calls();
    let kick = harness.events[0].set_kick(0);
    harness.tell(kick);
    assert_eq!(harness.calls(), [Call::Start { index: 0, base: 2, enabled: false }]);
    harness.end();
}

/// Goal: a ring starts with the last thing that it lacks, whichever that is, and never before.
#[test]
fn a_ring_starts_when_nothing_is_missing() {
    for last in 0..5 {
        let mut harness = Harness::new();
        let offered = harness.number(Sent::new(GET_PROTOCOL_FEATURES, []));
        harness.tell(Sent::number(SET_PROTOCOL_FEATURES, offered));
        let events = Events::new();
        let steps = || {
            [
                Sent::number(SET_FEATURES, FEATURES),
                Sent::table(&[region()]).with(memory(SIZE)),
                Sent::state(SET_VRING_NUM, 0, 256),
                Sent::addresses(0, 0, ring_at(0)),
                events.set_kick(0),
            ]
        };
        let order = (0..5).filter(|step| *step != last).chain([last]);
        for (count, step) in order.enumerate() {
            assert!(harness.session.backend().rings.is_empty(), "{last}: after {count}");
            harness.tell(steps().into_iter().nth(step).expect("a step"));
        }
        assert_eq!(harness.session.backend().rings.len(), 1, "{last}");
        harness.end();
    }
}

/// Goal: a ring without entries, which DPDK's virtio-user has for queues that its driver does not use,
/// does not start and is no error.
#[test]
fn a_ring_without_entries_does_not_start() {
    let mut harness = Harness::negotiated();
    harness.tell(Sent::state(SET_VRING_NUM, 2, 0));
    harness.tell(Sent::state(SET_VRING_BASE, 2, 0));
    harness.tell(Sent::addresses(2, 0, [0; 4]));
    let kick = harness.events[2].set_kick(2);
    harness.tell(kick);
    harness.tell(Sent::state(SET_VRING_ENABLE, 2, 1));
    assert!(harness.session.backend().rings.is_empty());
    assert_eq!(harness.ask(Sent::state(GET_VRING_BASE, 2, 0)).payload, u32s(&[2, 0]));
    harness.end();
}

#[test]
fn a_running_ring_is_enabled_and_disabled() {
    let mut harness = Harness::running();
    for (enable, calls) in [
        (1, vec![]),
        (0, vec![Call::Enable(1, false)]),
        (0, vec![]),
        (1, vec![Call::Enable(1, true)]),
    ] {
        harness.tell(Sent::state(SET_VRING_ENABLE, 1, enable));
        assert_eq!(harness.calls(), calls);
    }
    // What is set before a ring runs counts when it starts.
    harness.tell(Sent::state(SET_VRING_ENABLE, 2, 1));
    assert!(harness.calls().is_empty());
    harness.set_up(2, 9);
    assert_eq!(harness.calls(), [Call::Start { index: 2, base: 9, enabled: true }]);
    harness.end();
}

/// Goal: a call event that replaces another while the ring runs is signalled once, as an interrupt
/// may have gone to the old one. Before the ring runs it is not.
#[test]
fn a_replaced_call_event_is_signalled_once() {
    let mut harness = Harness::running();
    assert_eq!(signalled(&harness.events[0].call), 0);
    let (call, end) = pipe().expect("a pipe");
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(&end));
    assert_eq!(harness.calls(), [Call::Interrupt(0, true)]);
    assert_eq!(signalled(&call), 8);
    harness.tell(Sent::number(SET_VRING_CALL, NO_DESCRIPTOR));
    assert_eq!(harness.calls(), [Call::Interrupt(0, false)]);
    // A guest that does not read is no reason to wait.
    let (full, end) = pipe().expect("a pipe");
    for _ in 0..10_000 {
        harness.tell(Sent::number(SET_VRING_CALL, 0).with(&end));
    }
    assert!(signalled(&full) < 80_000, "the pipe is full");
    // Neither is one that is gone.
    drop(full);
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(&end));
    drop(end);
    harness.end();
}

/// Goal: a kick event is read whatever was written to it, and a call event is written by 8 bytes.
#[test]
fn events_have_no_values() {
    use std::io::Write;
    let mut harness = Harness::running();
    let kick = harness.session.backend().rings[&0].kick.clone().expect("an event");
    assert!(!kick.clear().expect("it is read"));
    for bytes in [&[0u8; 8][..], &[1; 1], &[7; 24]] {
        harness.events[0].kick.write_all(bytes).expect("a kick");
        assert!(kick.clear().expect("it is read"));
        assert!(!kick.clear().expect("it is read"));
    }
    // A pipe that nobody can write to is readable for ever, and must not be waited for.
    let (reader, _) = pipe().expect("a pipe");
    harness.tell(Sent::number(SET_VRING_KICK, 1).with(reader));
    let ended = harness.session.backend().rings[&1].kick.clone().expect("an event");
    let error = ended.clear().expect_err("it has ended");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    let call = harness.session.backend().rings[&0].call.clone().expect("an event");
    call.signal().expect("it is written");
    assert_eq!(signalled(&harness.events[0].call), 8);
    drop((kick, call));
    harness.end();
}

/// Goal: sockets work as well, as user-mode Linux makes its pipes of them, and a front end that does not
/// read them is no reason to wait.
#[test]
fn sockets_are_events() {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixStream};
    let mut harness = Harness::running();
    let (mut call, call_end) = UnixStream::pair().expect("sockets");
    let (mut kick, kick_end) = UnixStream::pair().expect("sockets");
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(call_end));
    harness.tell(Sent::number(SET_VRING_KICK, 0).with(kick_end));
    let ring = &harness.session.backend().rings[&0];
    let (own_kick, own_call) = (ring.kick.clone(), ring.call.clone());
    let (own_kick, own_call) = (own_kick.expect("an event"), own_call.expect("an event"));
    assert!(!own_kick.clear().expect("it is read"));
    kick.write_all(&[1; 8]).expect("a kick");
    assert!(own_kick.clear().expect("it is read"));
    let mut signal = [0; 8];
    call.read_exact(&mut signal).expect("the new event is signalled once");
    for _ in 0..100_000 {
        own_call.signal().expect("it never waits");
    }
    drop((call, kick));
    assert!(own_call.signal().is_err());
    assert_eq!(
        own_kick.clear().expect_err("it has ended").kind(),
        std::io::ErrorKind::UnexpectedEof
    );
    let (datagrams, end) = UnixDatagram::pair().expect("sockets");
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(end));
    assert_eq!(datagrams.recv(&mut signal).expect("a signal"), 8);
    harness.end();
}

/// Goal: eventfds work as well as pipes, in both directions, and other things without a type are not
/// waited for.
#[cfg(target_os = "linux")]
#[test]
fn eventfds_are_events_and_epoll_descriptors_are_none() {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the call takes numbers only, and returns a new descriptor.
    let eventfd = || unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    let (mut call, mut kick) = (eventfd(), eventfd());
    let mut harness = Harness::running();
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(&call));
    harness.tell(Sent::number(SET_VRING_KICK, 0).with(&kick));
    let ring = &harness.session.backend().rings[&0];
    let own_kick = ring.kick.clone().expect("an event");
    assert!(!own_kick.clear().expect("it is read"), "the check of it has added nothing");
    kick.write_all(&5u64.to_ne_bytes()).expect("a kick");
    assert!(own_kick.clear().expect("it is read"));
    assert!(!own_kick.clear().expect("it is read"));
    ring.call.as_ref().expect("an event").signal().expect("it is written");
    let mut count = [0; 8];
    call.read_exact(&mut count).expect("two signals: the replacement's, and this one");
    assert_eq!(u64::from_ne_bytes(count), 2);
    // A counter that is full is signalled already, and nobody waits.
    call.write_all(&(u64::MAX - 1).to_ne_bytes()).expect("it is full");
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(&call));

    // SAFETY: the call takes numbers only, and returns a new descriptor.
    let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let error = harness.refused(Sent::number(SET_VRING_KICK, 0).with(&epoll));
    assert!(matches!(error, Error::NotAnEvent { .. }), "{error}");
    harness.end();
}

/// Goal: a replaced kick event starts the ring again with it, and nothing is lost.
#[test]
fn a_replaced_kick_event_restarts_the_ring() {
    let mut harness = Harness::running();
    harness.session.backend_mut().taken = 4;
    let kick = harness.events[1].set_kick(1);
    harness.tell(kick);
    assert_eq!(harness.calls(), [Call::Stop(1), Call::Start { index: 1, base: 4, enabled: true }]);
    harness.end();
}

/// Goal: new memory is used by rings that run, and a ring that is not in it waits for memory that has
/// it, since front ends remove and add regions that were merged or split.
#[test]
fn memory_that_is_replaced_restarts_the_rings_that_are_in_it() {
    let mut harness = Harness::running();
    harness.session.backend_mut().taken = 1;
    let whole = region();
    let half = Region { size: 0x1_0000, ..whole };
    harness.tell(Sent::table(&[half]).with(&harness.memory));
    assert_eq!(
        harness.calls(),
        [
            Call::Stop(0),
            Call::Stop(1),
            Call::Memory { regions: 1, sealed: false },
            Call::Start { index: 0, base: 1, enabled: true },
        ]
    );
    let rest = Region {
        guest_address: GUEST + 0x1_0000,
        size: SIZE - 0x1_0000,
        user_address: USER + 0x1_0000,
        mmap_offset: 0x1_0000,
    };
    harness.tell(Sent::region(ADD_MEM_REG, rest).with(&harness.memory));
    assert_eq!(
        harness.calls(),
        [
            Call::Stop(0),
            Call::Memory { regions: 2, sealed: false },
            Call::Start { index: 0, base: 2, enabled: true },
            Call::Start { index: 1, base: 1, enabled: true },
        ]
    );
    harness.end();
}

/// Goal: a status of 0 stops the rings, and the base can be asked for after that (QEMU 7.2).
#[test]
fn a_status_of_zero_stops_the_rings_and_keeps_their_bases() {
    let mut harness = Harness::running();
    harness.session.backend_mut().taken = 6;
    harness.tell(Sent::number(SET_STATUS, 15));
    assert_eq!(harness.number(Sent::new(GET_STATUS, [])), 15);
    harness.tell(Sent::number(SET_STATUS, 0));
    assert_eq!(harness.calls(), [Call::Status(15), Call::Stop(0), Call::Stop(1), Call::Status(0)]);
    assert_eq!(harness.ask(Sent::state(GET_VRING_BASE, 1, 0)).payload, u32s(&[1, 6]));
    harness.end();
}

/// Goal: RESET_DEVICE forgets rings and features, and keeps the memory, of which QEMU sends changes
/// only. RESET_OWNER does nothing.
#[test]
fn a_reset_forgets_rings_and_features_but_not_the_memory() {
    let mut harness = Harness::running();
    harness.tell(Sent::new(RESET_OWNER, []));
    assert!(harness.calls().is_empty());
    harness.session.backend_mut().taken = 6;
    assert_eq!(harness.number(Sent::new(RESET_DEVICE, []).need_reply()), 0);
    assert_eq!(harness.calls(), [Call::Stop(0), Call::Stop(1), Call::Reset]);
    assert_eq!(harness.ask(Sent::state(GET_VRING_BASE, 1, 0)).payload, u32s(&[1, 0]));
    harness.tell(Sent::number(SET_FEATURES, FEATURES));
    harness.set_up(1, 0);
    assert_eq!(
        harness.calls(),
        [Call::Features(FEATURES & !(1 << 30)), Call::Start { index: 1, base: 0, enabled: false }]
    );
    harness.end();
}

/// Goal: other features while rings run are a new driver: the rings stop until they are kicked.
#[test]
fn other_features_stop_the_rings() {
    let mut harness = Harness::running();
    harness.tell(Sent::number(SET_FEATURES, FEATURES));
    assert!(harness.calls().is_empty(), "the same features change nothing");
    let fewer = FEATURES & !(1 << 15);
    harness.tell(Sent::number(SET_FEATURES, fewer));
    assert_eq!(harness.calls(), [Call::Stop(0), Call::Stop(1), Call::Features(fewer & !(1 << 30))]);
    let kick = harness.events[0].set_kick(0);
    harness.tell(kick);
    assert_eq!(harness.calls(), [Call::Start { index: 0, base: 0, enabled: true }]);
    harness.end();
}

#[test]
fn features_without_protocol_features_enable_all_rings() {
    let mut harness = Harness::negotiated();
    harness.set_up(0, 0);
    harness.calls();
    harness.tell(Sent::number(SET_FEATURES, FEATURES & !(1 << 30)));
    assert_eq!(harness.calls(), [Call::Enable(0, true)]);
    harness.end();
}

/// Goal: a ring whose parts are not in the memory cannot start, and the front end hears why. Nothing
/// is left of the connection.
#[test]
fn a_ring_outside_the_memory_is_refused() {
    for part in 0..3 {
        let mut harness = Harness::negotiated();
        let mut addresses = ring_at(0);
        // Its last byte is the first that is not in the memory.
        let len = [16 * 256, 6 + 8 * 256, 6 + 2 * 256][part];
        addresses[part] = (USER + SIZE - len).next_multiple_of(16);
        harness.tell(Sent::state(SET_VRING_NUM, 0, 256));
        harness.tell(Sent::addresses(0, 0, addresses));
        let inside = addresses[part] + len <= USER + SIZE;
        let kick = harness.events[0].set_kick(0);
        if inside {
            harness.tell(kick);
            let kick = harness.events[0].set_kick(0);
            addresses[part] += 16;
            harness.tell(Sent::addresses(0, 0, addresses));
            harness.refused_by_address(kick);
        } else {
            harness.refused_by_address(kick);
        }
        harness.end();
    }
}

impl Harness {
    fn refused_by_address(&mut self, kick: Sent) {
        let error = self.refused(kick.need_reply());
        assert!(matches!(error, Error::RingAddress { index: 0, .. }), "{error}");
        assert_eq!(self.frontend.reply().number(), 1, "it is told that it failed");
    }
}

/// Goal: a front end that does not know REPLY_ACK hears nothing of an error but the end.
#[test]
fn an_error_is_told_to_those_only_who_negotiated_it() {
    let mut harness = Harness::negotiated();
    harness.tell(Sent::number(SET_PROTOCOL_FEATURES, all_but(&[ProtocolFeature::ReplyAck])));
    // The size comes last.
    harness.tell(Sent::addresses(0, 0, [16, 4, 2, 0]));
    harness.tell(Sent::number(SET_VRING_KICK, NO_DESCRIPTOR));
    let error = harness.refused(Sent::state(SET_VRING_NUM, 0, 256).need_reply());
    assert!(matches!(error, Error::RingAddress { index: 0, .. }), "{error}");
    assert_eq!(harness.frontend.replied(), 0);
    harness.end();
}

#[test]
fn a_device_that_refuses_a_ring_ends_the_connection() {
    let mut harness = Harness::negotiated();
    harness.session.backend_mut().refuses_start = true;
    harness.tell(Sent::state(SET_VRING_NUM, 0, 256));
    harness.tell(Sent::addresses(0, 0, ring_at(0)));
    let kick = harness.events[0].set_kick(0);
    let error = harness.refused(kick);
    assert!(matches!(error, Error::Backend { index: 0, .. }), "{error}");
    harness.end();
}

/// Goal: the end of a session waits for the device, and gives everything back.
#[test]
fn an_ended_session_has_stopped_its_rings() {
    let mut harness = Harness::running();
    harness.session.backend_mut().drains = 3;
    assert_eq!(harness.session.end(), Poll::Pending);
    assert_eq!(harness.session.end(), Poll::Pending);
    harness.session.backend_mut().drains = 0;
    assert_eq!(harness.session.end(), Poll::Ready(()));
    let calls = harness.calls();
    assert_eq!(calls.last(), Some(&Call::Memory { regions: 0, sealed: true }));
    assert_eq!(harness.process(), Progress::Closed);
    harness.end();
}
