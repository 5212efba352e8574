//! Requests that are not about rings or memory.

use std::io::{Read, Write, pipe};
use std::os::unix::net::UnixStream;

use vmring_virtio::vhost_user::features::ProtocolFeature;
use vmring_virtio::vhost_user::{Error, Progress, Request, STATE_MAX};

use crate::frontend::*;
use crate::harness::*;

/// Goal: a reply comes to need_reply only after REPLY_ACK was negotiated.
#[test]
fn need_reply_counts_after_it_is_negotiated() {
    let mut harness = Harness::new();
    harness.tell(Sent::new(SET_OWNER, []).need_reply());
    harness.tell(Sent::number(SET_PROTOCOL_FEATURES, all_but(&[ProtocolFeature::ReplyAck])));
    harness.tell(Sent::new(SET_OWNER, []).need_reply());
    harness.tell(Sent::number(SET_PROTOCOL_FEATURES, ProtocolFeature::ReplyAck.bit()));
    assert_eq!(harness.number(Sent::new(SET_OWNER, []).need_reply()), 0);
    harness.tell(Sent::new(SET_OWNER, []));
    // A request with a reply of its own has no other.
    assert_eq!(harness.number(Sent::new(GET_FEATURES, []).need_reply()), LOGGED);
    harness.end();
}

/// Goal: a request of a protocol feature that was not negotiated ends the connection.
#[test]
fn what_was_not_negotiated_is_refused() {
    let (socket, _other) = UnixStream::pair().expect("sockets");
    let rows = [
        (Sent::new(GET_QUEUE_NUM, []), ProtocolFeature::Mq),
        (Sent::number(SEND_RARP, 2), ProtocolFeature::Rarp),
        (Sent::number(NET_SET_MTU, 1500), ProtocolFeature::Mtu),
        (Sent::new(SET_BACKEND_REQ_FD, []).with(&socket), ProtocolFeature::BackendReq),
        (Sent::config(GET_CONFIG, 0, 0, &[0; 6]), ProtocolFeature::Config),
        (Sent::config(SET_CONFIG, 0, 0, &[0; 6]), ProtocolFeature::Config),
        (Sent::new(RESET_DEVICE, []), ProtocolFeature::ResetDevice),
        (Sent::new(GET_MAX_MEM_SLOTS, []), ProtocolFeature::ConfigureMemSlots),
        (
            Sent::region(ADD_MEM_REG, region()).with(memory(SIZE)),
            ProtocolFeature::ConfigureMemSlots,
        ),
        (Sent::region(REM_MEM_REG, region()), ProtocolFeature::ConfigureMemSlots),
        (Sent::number(SET_STATUS, 1), ProtocolFeature::Status),
        (Sent::new(GET_STATUS, []), ProtocolFeature::Status),
        (
            Sent::state(SET_DEVICE_STATE_FD, 0, 0).with(pipe().expect("a pipe").1),
            ProtocolFeature::DeviceState,
        ),
        (Sent::new(CHECK_DEVICE_STATE, []), ProtocolFeature::DeviceState),
    ];
    for (message, missing) in rows {
        let mut harness = Harness::new();
        harness.tell(Sent::number(SET_PROTOCOL_FEATURES, all_but(&[missing])));
        let number = message.request;
        let error = harness.refused(message);
        let Error::NotNegotiated { request, feature } = error else { panic!("{error:?}") };
        assert_eq!((request as u32, feature), (number, missing));
        harness.end();
    }
}

#[test]
fn bits_that_were_not_offered_are_refused() {
    for (request, features) in [
        (SET_FEATURES, FEATURES | 1 << 17),
        (SET_FEATURES, FEATURES | 1 << 34),
        (SET_PROTOCOL_FEATURES, 1 << 12),
        (SET_PROTOCOL_FEATURES, 1 << 63),
    ] {
        let mut harness = Harness::new();
        let error = harness.refused(Sent::number(request, features));
        let Error::Features { request: refused, bits } = error else { panic!("{error:?}") };
        assert_eq!((refused as u32, bits.count_ones()), (request, 1));
        harness.end();
    }
    let mut without = settings();
    without.config = false;
    let mut harness = Harness::with(without, Device::default());
    let config = ProtocolFeature::Config.bit();
    let error = harness.refused(Sent::number(SET_PROTOCOL_FEATURES, config));
    assert!(matches!(error, Error::Features { bits, .. } if bits == config), "{error}");
}

/// Goal: an MTU that no guest or no device can have is refused by the reply, and the connection goes
/// on.
#[test]
fn an_mtu_is_checked_by_the_session_and_the_device() {
    let mut harness = Harness::negotiated();
    for (mtu, result) in [(0, 1), (67, 1), (68, 0), (1500, 0), (9001, 1), (65536, 1), (u64::MAX, 1)]
    {
        assert_eq!(harness.number(Sent::number(NET_SET_MTU, mtu).need_reply()), result, "{mtu}");
    }
    harness.calls();
    harness.tell(Sent::number(NET_SET_MTU, 1280));
    assert_eq!(harness.calls(), [Call::Mtu(1280)]);
    assert_eq!(harness.session.stats().refused, 5);
    harness.end();
}

#[test]
fn a_guest_is_announced_by_its_own_address_only() {
    let mut harness = Harness::negotiated();
    harness.calls();
    let rarp = |mac: [u8; 6]| {
        let [a, b, c, d, e, f] = mac;
        Sent::new(SEND_RARP, [a, b, c, d, e, f, 0, 0]).need_reply()
    };
    assert_eq!(harness.number(rarp(MAC)), 0);
    assert_eq!(harness.calls(), [Call::Announce(MAC)]);
    assert_eq!(harness.number(rarp([0xff; 6])), 1);
    assert_eq!(harness.number(rarp([0; 6])), 1);
    assert!(harness.calls().is_empty());
    harness.end();
}

/// Goal: the configuration space is read at any place, with as many bytes as were asked for, and an
/// error is a reply without bytes.
#[test]
fn the_configuration_space_is_read_anywhere() {
    let mut harness = Harness::negotiated();
    let known = [2, 0, 0, 0, 0, 0x0a, 1, 0, 2, 0, 0xdc, 0x05];
    let mut space = [0; 256];
    space[..12].copy_from_slice(&known);
    for (offset, len, flags) in [
        (0, 12, 0),
        (0, 6, 1),
        (6, 2, 0),
        (10, 2, 1),
        (8, 60, 0),
        (0, 256, 0),
        (255, 1, 0),
        (9, 0, 0),
    ] {
        let asked = vec![0xaa; len];
        let reply = harness.ask(Sent::config(GET_CONFIG, offset, flags, &asked));
        let bytes = &space[offset as usize..offset as usize + len];
        let wanted = [u32s(&[offset, len as u32, flags]), bytes.to_vec()].concat();
        assert_eq!(reply.payload, wanted, "{len} bytes at {offset}");
    }
    for (offset, len) in [(256, 1), (255, 2), (u32::MAX, 8)] {
        let reply = harness.ask(Sent::config(GET_CONFIG, offset, 0, &vec![0; len]));
        assert_eq!(reply.payload, [], "{len} bytes at {offset}");
    }
    harness.end();
}

/// Goal: nobody changes the configuration space, with any flags; what is there already may be set,
/// as at the destination of a migration.
#[test]
fn the_configuration_space_is_not_changed() {
    let mut harness = Harness::negotiated();
    for flags in [0, 1] {
        let mut write = |offset, bytes: &[u8]| {
            harness.number(Sent::config(SET_CONFIG, offset, flags, bytes).need_reply())
        };
        assert_eq!(write(0, &[2, 0, 0, 0, 0, 0x0b]), 1);
        assert_eq!(write(0, &MAC), 0);
        assert_eq!(write(10, &[0xdc, 0x05]), 0);
        assert_eq!(write(255, &[0, 0]), 1);
        assert_eq!(write(u32::MAX, &[0]), 1);
    }
    harness.end();
}

/// Goal: the channel of the back end must be a connected socket. On it the front end hears of a
/// change of the configuration.
#[test]
fn a_change_of_the_configuration_is_told_on_the_channel() {
    let mut harness = Harness::negotiated();
    assert!(!harness.session.notify_config(), "there is no channel");
    let (mut own, other) = UnixStream::pair().expect("sockets");
    let set = |fd: &dyn std::os::fd::AsFd| {
        Sent::new(SET_BACKEND_REQ_FD, []).with(fd.as_fd()).need_reply()
    };
    assert_eq!(harness.number(set(&other)), 0);
    assert_eq!(harness.number(set(&pipe().expect("a pipe").1)), 1, "a pipe is no channel");
    let datagrams = std::os::unix::net::UnixDatagram::pair().expect("sockets");
    assert_eq!(harness.number(set(&datagrams.0)), 1, "datagrams are no channel");
    drop(other);
    assert!(harness.session.notify_config(), "the first channel is still there");
    let mut message = [0; 12];
    own.read_exact(&mut message).expect("a message");
    assert_eq!(message.to_vec(), u32s(&[2, VERSION, 0]));
    // A front end that does not read does not stop us, nor does one that goes.
    let sent = (0..100_000).take_while(|_| harness.session.notify_config()).count();
    assert!(sent < 100_000, "the channel is full");
    drop(own);
    assert!(!harness.session.notify_config());
    harness.end();
}

#[test]
fn a_broken_device_is_shown_in_the_status() {
    let mut harness = Harness::running();
    let error = harness.events[1].set_err(1);
    harness.tell(error);
    harness.tell(Sent::number(SET_STATUS, 15));
    harness.session.set_needs_reset(1);
    assert_eq!(harness.number(Sent::new(GET_STATUS, [])), 0x40 | 15);
    assert_eq!(signalled(&harness.events[1].error), 8);
    harness.tell(Sent::number(SET_STATUS, 0));
    assert_eq!(harness.number(Sent::new(GET_STATUS, [])), 0);
    harness.end();
}

const SAVE: u32 = 0;
const LOAD: u32 = 1;

fn transfer(direction: u32, fd: impl std::os::fd::AsFd) -> Sent {
    Sent::state(SET_DEVICE_STATE_FD, direction, 0).with(fd)
}

/// Goal: a state goes through a pipe in pieces, and arrives as it was; larger ones than a pipe holds
/// do too.
#[test]
fn a_state_is_saved_and_loaded() {
    for len in [0, 1, 1000, STATE_MAX] {
        let state: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        let mut source = Harness::negotiated();
        source.session.backend_mut().state = state.clone();
        let (mut from, to) = pipe().expect("a pipe");
        assert_eq!(source.number(transfer(SAVE, to)), 0x100);
        let mut saved = Vec::new();
        let mut piece = [0; 5000];
        loop {
            match from.read(&mut piece).expect("the state") {
                0 => break,
                read => saved.extend_from_slice(&piece[..read]),
            }
            // As an owner does who polls `Session::transfer`.
            assert_eq!(source.process(), Progress::Idle);
        }
        assert!(source.session.transfer().is_none());
        assert_eq!(source.number(Sent::new(CHECK_DEVICE_STATE, [])), 0);
        assert_eq!(source.number(Sent::new(CHECK_DEVICE_STATE, [])), 1, "there is no other");
        source.end();

        let mut destination = Harness::negotiated();
        let (from, mut to) = pipe().expect("a pipe");
        assert_eq!(destination.number(transfer(LOAD, from)), 0x100);
        destination.calls();
        for piece in saved.chunks(3000) {
            to.write_all(piece).expect("the pipe takes it");
            assert_eq!(destination.process(), Progress::Idle);
        }
        // The question comes before the end of the state: its answer waits.
        destination.frontend.send(&Sent::new(CHECK_DEVICE_STATE, []));
        assert_eq!(destination.process(), Progress::Transferring);
        assert_eq!(destination.frontend.replied(), 0);
        assert!(destination.session.transfer().is_some());
        drop(to);
        assert_eq!(destination.process(), Progress::Idle);
        assert_eq!(destination.frontend.reply().number(), 0);
        assert_eq!(destination.calls(), [Call::Load(state)]);
        destination.end();
    }
}

/// Goal: bytes that are no state are refused at the check, without growth.
#[test]
fn a_state_that_is_none_is_refused() {
    let state = |magic: &[u8], version: u32, len: u32, bytes: &[u8]| {
        [magic, &version.to_le_bytes(), &len.to_le_bytes(), bytes].concat()
    };
    let rows: Vec<(&str, Vec<u8>, u64)> = vec![
        ("right", state(b"VMRG", 1, 3, b"abc"), 0),
        ("nothing", vec![], 1),
        ("a part of a header", b"VMRG".to_vec(), 1),
        ("another magic", state(b"vmrg", 1, 3, b"abc"), 1),
        ("another version", state(b"VMRG", 2, 3, b"abc"), 1),
        ("too few bytes", state(b"VMRG", 1, 4, b"abc"), 1),
        ("too many bytes", state(b"VMRG", 1, 2, b"abc"), 1),
        ("bytes that the device refuses", state(b"VMRG", 1, 5, b"wrong"), 1),
        ("too long", state(b"VMRG", 1, u32::MAX, &[0; STATE_MAX + 5000]), 1),
    ];
    for (name, bytes, result) in rows {
        let mut harness = Harness::negotiated();
        // A file has its end at once, and carries more than a pipe.
        let mut file = memory(0);
        file.write_all(&bytes).expect("the file is written");
        std::io::Seek::rewind(&mut file).expect("its beginning");
        assert_eq!(harness.number(transfer(LOAD, &file)), 0x100, "{name}");
        assert_eq!(harness.number(Sent::new(CHECK_DEVICE_STATE, [])), result, "{name}");
        harness.end();
    }
    let mut harness = Harness::negotiated();
    let zero = std::fs::File::open("/dev/zero").expect("a device");
    assert_eq!(harness.number(transfer(LOAD, zero)), 0x101, "a device is no channel");
    harness.end();
}

/// Goal: a state without an end is refused when it is longer than one may be.
#[test]
fn an_endless_state_is_refused() {
    let mut harness = Harness::negotiated();
    let (from, mut to) = pipe().expect("a pipe");
    assert_eq!(harness.number(transfer(LOAD, from)), 0x100);
    let mut written = 0;
    // When the back end has had enough, it closes the pipe.
    while to.write_all(&[0; 4096]).is_ok() {
        written += 4096;
        assert!(written < STATE_MAX + 3 * 4096, "{written} bytes");
        assert_eq!(harness.process(), Progress::Idle);
    }
    assert!(harness.session.transfer().is_none());
    assert_eq!(harness.number(Sent::new(CHECK_DEVICE_STATE, [])), 1);
    harness.end();
}

/// Goal: a transfer is refused while a ring runs, during another one, and with unknown parameters.
#[test]
fn a_transfer_that_is_not_possible_is_refused() {
    let mut harness = Harness::running();
    let ends = pipe().expect("a pipe");
    assert_eq!(harness.number(transfer(SAVE, &ends.1)), 0x101, "rings run");
    for index in 0..2 {
        harness.ask(Sent::state(GET_VRING_BASE, index, 0));
    }
    assert_eq!(harness.number(transfer(2, &ends.1)), 0x101, "no direction");
    let phase = Sent::state(SET_DEVICE_STATE_FD, SAVE, 1).with(&ends.1);
    assert_eq!(harness.number(phase), 0x101, "no phase");
    assert_eq!(harness.number(transfer(LOAD, &ends.0)), 0x100);
    assert_eq!(harness.number(transfer(LOAD, &ends.0)), 0x101, "there is one already");
    // A reader that is gone.
    let mut harness = Harness::negotiated();
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    assert_eq!(harness.number(transfer(SAVE, writer)), 0x100);
    assert_eq!(harness.number(Sent::new(CHECK_DEVICE_STATE, [])), 1);
    // A state of the device that is too large.
    harness.session.backend_mut().state = vec![0; STATE_MAX + 1];
    assert_eq!(harness.number(transfer(SAVE, pipe().expect("a pipe").1)), 0x101);
    harness.end();
}

#[test]
fn requests_have_the_numbers_of_the_document() {
    for (place, request) in Request::ALL.iter().enumerate() {
        assert_eq!(*request as usize, place + 1);
        assert_eq!(Request::from_number(place as u32 + 1), Some(*request));
    }
    assert_eq!(Request::from_number(0), None);
    assert_eq!(Request::from_number(45), None);
    assert_eq!(Request::SetBackendReqFd.to_string(), "SET_BACKEND_REQ_FD");
}
