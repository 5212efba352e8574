//! What a front end must not send. Each ends the connection with an error that names the request and
//! the cause, changes nothing, and leaves no descriptor open.

use std::fs::File;
use std::io::pipe;
use std::os::fd::{AsFd, OwnedFd};

use vmring_virtio::vhost_user::{Error, Request};

use crate::frontend::*;
use crate::harness::*;

/// A name, a message and what its error is.
struct Row {
    name: &'static str,
    message: Sent,
    is_expected: fn(&Error) -> bool,
}

fn row(name: &'static str, message: Sent, is_expected: fn(&Error) -> bool) -> Row {
    Row { name, message, is_expected }
}

fn is_size(error: &Error) -> bool {
    matches!(error, Error::Size { .. })
}

fn is_descriptors(error: &Error) -> bool {
    matches!(error, Error::Descriptors { .. })
}

fn is_reserved(error: &Error) -> bool {
    matches!(error, Error::Reserved { .. })
}

fn is_index(error: &Error) -> bool {
    matches!(error, Error::RingIndex { rings: 4, .. })
}

fn rows(file: &File) -> Vec<Row> {
    let flags = |flags, message: Sent| Sent { flags, ..message };
    let with_many = |message: Sent, count| (0..count).fold(message, |sent, _| sent.with(file));
    let event = || pipe().expect("a pipe").1;
    let is_flags = |error: &Error| matches!(error, Error::Flags { .. });
    let is_not_event = |error: &Error| matches!(error, Error::NotAnEvent { .. });
    let is_not_offered = |error: &Error| matches!(error, Error::NotOffered { .. });
    let mut rows = vec![
        row("request 0", Sent::new(0, []), |e| matches!(e, Error::UnknownRequest { number: 0 })),
        row("request 45", Sent::new(45, []), |e| matches!(e, Error::UnknownRequest { number: 45 })),
        row("a huge request", Sent::new(u32::MAX, []), |e| {
            matches!(e, Error::UnknownRequest { .. })
        }),
        row("version 0", flags(0, Sent::new(GET_FEATURES, [])), is_flags),
        row("version 2", flags(2, Sent::new(GET_FEATURES, [])), is_flags),
        row("version 3", flags(3, Sent::new(GET_FEATURES, [])), is_flags),
        row("a reply", flags(5, Sent::new(GET_FEATURES, [])), is_flags),
        row("a reserved flag", flags(1 << 31 | 1, Sent::new(GET_FEATURES, [])), is_flags),
        row("too many bytes", Sent::new(SET_CONFIG, [0; 269]), is_size),
        row("regions without a table", Sent::new(SET_MEM_TABLE, []), is_size),
        row("no regions", Sent::table(&[]), |e| matches!(e, Error::Regions { count: 0, .. })),
        row("nine regions", with_many(nine(), 8), |e| {
            matches!(e, Error::Regions { count: 9, max: 8, .. })
        }),
        row("a count without its regions", short_table(3).with(file), is_size),
        row("a part of a region", short_table(1).and([0; 31]).with(file), is_size),
        row("a region without a descriptor", Sent::table(&[region()]), is_descriptors),
        row("two descriptors for a region", with_many(Sent::table(&[region()]), 2), is_descriptors),
        row("a hundred descriptors", with_many(Sent::table(&[region()]), 100), is_descriptors),
        row("a descriptor too many", Sent::new(GET_FEATURES, []).with(file), is_descriptors),
        row("an added region without one", Sent::region(ADD_MEM_REG, region()), is_descriptors),
        row(
            "a removed region with two",
            with_many(Sent::region(REM_MEM_REG, region()), 2),
            is_descriptors,
        ),
        row("a region without padding", Sent::new(ADD_MEM_REG, [0; 32]).with(file), is_size),
        row("a log without its memory", Sent::new(SET_LOG_BASE, [0; 16]), is_descriptors),
        row("a log of a number", Sent::new(SET_LOG_BASE, [0; 8]).with(file), is_size),
        row("a log event that is none", Sent::new(SET_LOG_FD, []), is_descriptors),
        row("a ring of 3", Sent::state(SET_VRING_NUM, 0, 3), |e| {
            matches!(e, Error::RingSize { num: 3 })
        }),
        row("a ring of 65536", Sent::state(SET_VRING_NUM, 0, 65536), |e| {
            matches!(e, Error::RingSize { num: 65536 })
        }),
        row("a base of 17 bits", Sent::state(SET_VRING_BASE, 0, 65536), |e| {
            matches!(e, Error::RingBase { base: 65536 })
        }),
        row("flags of addresses", Sent::addresses(0, 2, ring_at(0)), is_reserved),
        row("a state of 2", Sent::state(SET_VRING_ENABLE, 0, 2), is_reserved),
        row("a status of 9 bits", Sent::number(SET_STATUS, 256), is_reserved),
        row("a kick of a file", Sent::number(SET_VRING_KICK, 0).with(file), is_not_event),
        row("a call of a file", Sent::number(SET_VRING_CALL, 0).with(file), is_not_event),
        row("an error of a file", Sent::number(SET_VRING_ERR, 0).with(file), is_not_event),
        row("a kick that is missing", Sent::number(SET_VRING_KICK, 0), is_descriptors),
        row(
            "a kick that is too much",
            Sent::number(SET_VRING_KICK, NO_DESCRIPTOR).with(event()),
            is_descriptors,
        ),
        row(
            "reserved bits of a kick",
            Sent::number(SET_VRING_KICK, 1 << 9).with(event()),
            is_reserved,
        ),
        row(
            "high bits of a call",
            Sent::number(SET_VRING_CALL, 1 << 63).with(event()),
            is_reserved,
        ),
        row("a log that is a pipe", Sent::new(SET_LOG_BASE, u64s(&[64, 0])).with(event()), |e| {
            matches!(e, Error::Map { request: Request::SetLogBase, .. })
        }),
        row("a log of no bytes", Sent::new(SET_LOG_BASE, u64s(&[0, 0])).with(file), |e| {
            matches!(e, Error::Map { request: Request::SetLogBase, .. })
        }),
        row("a log behind its file", Sent::new(SET_LOG_BASE, u64s(&[SIZE, 1])).with(file), |e| {
            matches!(e, Error::Map { request: Request::SetLogBase, .. })
        }),
        row(
            "a log that overflows",
            Sent::new(SET_LOG_BASE, u64s(&[u64::MAX - 1, u64::MAX])).with(file),
            |e| matches!(e, Error::Map { request: Request::SetLogBase, .. }),
        ),
        row("a configuration without a header", Sent::new(GET_CONFIG, [0; 11]), is_size),
        row("a configuration that is short", short_config(GET_CONFIG), is_size),
        row("a change that is short", short_config(SET_CONFIG), is_size),
        row("a channel that is missing", Sent::new(SET_BACKEND_REQ_FD, []), is_descriptors),
        row("a state without a descriptor", Sent::state(SET_DEVICE_STATE_FD, 0, 0), is_descriptors),
    ];
    for (name, part, by) in
        [("descriptor table", 0, 8), ("used ring", 1, 2), ("available ring", 2, 1)]
    {
        let mut addresses = ring_at(0);
        addresses[part] += by;
        rows.push(row(name, Sent::addresses(0, 0, addresses), |e| {
            matches!(e, Error::RingAlignment { .. })
        }));
    }
    for index in [4, 255] {
        let big = u64::from(index);
        rows.extend([
            row("the size of no ring", Sent::state(SET_VRING_NUM, index, 256), is_index),
            row("the base of no ring", Sent::state(SET_VRING_BASE, index, 0), is_index),
            row("the question of no ring", Sent::state(GET_VRING_BASE, index, 0), is_index),
            row("the state of no ring", Sent::state(SET_VRING_ENABLE, index, 1), is_index),
            row("the addresses of no ring", Sent::addresses(index, 0, ring_at(0)), is_index),
            row("the kick of no ring", Sent::number(SET_VRING_KICK, big).with(event()), is_index),
            row("the call of no ring", Sent::number(SET_VRING_CALL, big).with(event()), is_index),
            row("the error of no ring", Sent::number(SET_VRING_ERR, big).with(event()), is_index),
        ]);
    }
    rows.push(row("a huge index", Sent::state(SET_VRING_NUM, u32::MAX, 256), is_index));
    for request in Request::ALL {
        let number = *request as u32;
        if [22, 23, 26, 27, 28, 29, 30, 31, 32, 33, 35, 41, 44].contains(&number) {
            rows.push(row("not offered", Sent::new(number, []), is_not_offered));
            continue;
        }
        // A payload of this size belongs to no request.
        rows.push(row("a payload of seven bytes", Sent::new(number, [0; 7]), is_size));
    }
    rows
}

fn nine() -> Sent {
    // Eight fit into what is received of a message; nine are seen by their number.
    let mut sent = Sent::table(&[region(); 8]);
    sent.payload[..4].copy_from_slice(&9u32.to_ne_bytes());
    sent
}

/// A table of two regions that says another number.
fn short_table(count: u32) -> Sent {
    let mut sent = Sent::table(&[region(); 2]);
    sent.payload[..4].copy_from_slice(&count.to_ne_bytes());
    sent
}

fn short_config(request: u32) -> Sent {
    let mut sent = Sent::config(request, 0, 0, &[0; 8]);
    sent.payload.pop();
    sent
}

fn is_file(fd: &OwnedFd) -> bool {
    let fd = fd.try_clone().expect("a copy");
    File::from(fd).metadata().expect("metadata").is_file()
}

#[test]
fn each_hostile_message_ends_the_connection_and_changes_nothing() {
    let file = memory(SIZE);
    for Row { name, message, is_expected } in rows(&file) {
        let mut harness = Harness::running();
        let number = message.request;
        let given: Vec<OwnedFd> =
            message.fds.iter().map(|fd| fd.try_clone().expect("a copy")).collect();
        let error = harness.refused(message);
        assert!(is_expected(&error), "{name}: {error:?}");
        // The sentence names the request, as the rest of it names the cause.
        if let Some(request) = Request::from_number(number) {
            let text = error.to_string();
            let named = text.contains(&request.to_string()) || text.contains("ring 0");
            assert!(named, "{name}: {text}");
        }
        assert!(harness.calls().is_empty(), "{name}");
        assert_eq!(harness.session.backend().rings.len(), 2, "{name}");
        harness.end();
        // The file is in other rows too; an event is in this one only.
        if let [event] = given.as_slice()
            && !is_file(event)
        {
            assert!(matches!(copies(event), None | Some(1)), "{name}: a copy is left");
        }
    }
    assert!(matches!(copies(&file), None | Some(1)), "every copy of the file is closed");
}

/// Goal: a descriptor of the path of a pipe, which cannot be read or written, is no event, and one of
/// a file is no memory.
#[cfg(target_os = "linux")]
#[test]
fn descriptors_of_paths_are_refused() {
    use std::os::unix::fs::OpenOptionsExt;
    let path = |path: &str| {
        File::options().read(true).custom_flags(libc::O_PATH).open(path).expect("a path")
    };
    let (_reader, writer) = pipe().expect("a pipe");
    let of_pipe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
    for request in [SET_VRING_KICK, SET_VRING_CALL] {
        let mut harness = Harness::running();
        let error = harness.refused(Sent::number(request, 0).with(path(&of_pipe)));
        assert!(matches!(error, Error::NotAnEvent { .. }), "{error:?}");
        harness.end();
    }
    let mut harness = Harness::running();
    let error = harness.refused(Sent::table(&[region()]).with(path("/proc/self/exe")));
    assert!(matches!(error, Error::Map { .. }), "{error:?}");
    harness.end();
}

/// Goal: descriptors that come with the payload, or in the middle of a header, count as well.
#[test]
fn descriptors_anywhere_in_a_message_are_counted_and_closed() {
    let file = memory(SIZE);
    let mut harness = Harness::running();
    let message = Sent::number(SET_VRING_CALL, 0).bytes();
    for (place, byte) in message.iter().enumerate() {
        let fds = vec![file.as_fd(); 20];
        harness.frontend.send_bytes(&[*byte], &fds).expect("it is sent");
        match harness.session.process() {
            Ok(_) => assert!(place < message.len() - 1),
            Err(error) => {
                let Error::Descriptors { count, takes: 1, .. } = error else { panic!("{error:?}") };
                assert_eq!(count, 20 * message.len());
            }
        }
        // Eight are kept until the message is whole.
        assert!(copies(&file).is_none_or(|open| open <= 9));
    }
    harness.end();
    assert!(matches!(copies(&file), None | Some(1)));
}

/// Goal: a front end that goes in the middle of a message is an error, and between two it is not.
#[test]
fn a_front_end_that_goes_inside_a_message_is_an_error() {
    for len in 0..=20 {
        let mut harness = Harness::running();
        let bytes = Sent::number(SET_FEATURES, FEATURES).bytes();
        harness.frontend.send_bytes(&bytes[..len], &[]).expect("it is sent");
        let (other, _) = Frontend::pair();
        drop(std::mem::replace(&mut harness.frontend, other));
        let first = harness.session.process();
        let last = match first {
            Ok(vmring_virtio::vhost_user::Progress::Idle) => harness.session.process(),
            other => other,
        };
        match last {
            Err(Error::Truncated { received }) => assert_eq!(received, len),
            Ok(progress) => {
                assert!(len == 0 || len == 20, "{len}");
                assert_eq!(progress, vmring_virtio::vhost_user::Progress::Closed);
            }
            Err(error) => panic!("{error:?}"),
        }
        harness.end();
    }
}
