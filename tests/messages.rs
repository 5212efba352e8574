//! Messages, read by those who get them: each is one sentence that names the cause and what helps.

use std::io;
use std::time::Duration;

use vmring::{
    CloseReason, ConfigError, Direction, Drive, Embedded, EntryError, Error, Interface, Loopback,
    Poller, PoolBuilder, Status, SubmitErrorKind,
};

use crate::support::guarded;

/// Checks that a message is one sentence, and that it has these words.
#[track_caller]
fn says(message: impl ToString, words: &[&str]) {
    let message = message.to_string();
    assert!(!message.is_empty() && !message.contains('\n'), "one line: {message}");
    assert!(!message.ends_with('.'), "no full stop: {message}");
    assert!(!message.contains("  "), "two blanks: {message}");
    for word in words {
        assert!(message.contains(word), "no '{word}' in: {message}");
    }
}

fn embedded(network: &str) -> Interface {
    Interface::builder().device(Embedded::network(network)).start().unwrap()
}

#[test]
fn a_runt_is_told_that_it_is_shorter_than_an_ethernet_header() {
    guarded(|| {
        let interface = embedded("messages: runt");
        let mut ring = interface.ring(Direction::Write).drive(Drive::Inline).build().unwrap();
        let mut frame = ring.alloc().unwrap();
        frame.copy_from(&[2; 13]).unwrap();
        ring.submit_write(frame, 1).unwrap();
        let mut results = Vec::new();
        while results.is_empty() {
            ring.wait(1, Some(Duration::from_secs(10)));
            results.extend(ring.reap().map(|done| done.result));
        }
        says(results[0].unwrap_err(), &["1003", "shorter than an Ethernet header", "14 bytes"]);
    });
}

#[test]
fn a_network_joined_with_other_settings_names_the_setting() {
    let name = "messages: mtu";
    let _first = embedded(name);
    let join = |builder: vmring::InterfaceBuilder, embedded: Embedded| {
        builder.device(embedded).start().unwrap_err()
    };
    let new = || Embedded::network(name);
    let other = ["exists already", "join it with its own settings", "name another"];
    let error = join(Interface::builder().mtu(9000), new());
    assert!(matches!(error, Error::Config(_)), "{error:?}");
    says(&error, &other);
    says(&error, &["with mtu 1500 and not 9000"]);
    let error = join(Interface::builder(), new().lease_time(Duration::from_secs(60)));
    says(error, &["with lease_time 86400s and not 60s"]);
    let error = join(Interface::builder(), new().overflow(7));
    says(error, &["with overflow its default and not 7"]);
    let range = "192.168.70.1/24".parse().unwrap();
    let error = join(Interface::builder().ipv4(range), new());
    says(error, &["with ipv4 192.168.64.1 to 192.168.64.254", "and not 192.168.70.1"]);
}

#[test]
fn a_ring_of_one_direction_says_which_directions_there_are() {
    guarded(|| {
        let interface = embedded("messages: direction");
        for (direction, reads) in [(Direction::Write, true), (Direction::Read, false)] {
            let mut ring = interface.ring(direction).drive(Drive::Inline).build().unwrap();
            let frame = ring.alloc().unwrap();
            let refused = match reads {
                true => ring.submit_read(frame, 1),
                false => ring.submit_write(frame, 1),
            };
            let kind = refused.unwrap_err().kind;
            assert_eq!(kind, SubmitErrorKind::WrongDirection);
            let read = "reads need Direction::Read or Both";
            says(kind, &["the other direction", read, "writes need Direction::Write or Both"]);
        }
    });
}

/// The inline ring is not driven while another thread stops the interface.
#[test]
fn a_stop_that_times_out_says_what_it_waits_for() {
    guarded(|| {
        let interface = embedded("messages: stop");
        let short = Duration::from_millis(20);
        let ring = || interface.ring(Direction::Write).drive(Drive::Inline).build().unwrap();
        let rings = [ring(), ring()];
        let error = interface.restart(short).unwrap_err();
        says(
            &error,
            &["did not restart within 20ms", "2 rings still use", "close", "reap or wait"],
        );
        let [first, second] = rings;
        drop(first);
        let error = interface.stop(short).unwrap_err();
        let Error::StopTimeout { action: "stop", rings: 1, timeout } = error else {
            panic!("{error:?}")
        };
        assert_eq!(timeout, short);
        says(&error, &["did not stop within 20ms", "1 ring still uses", "driven inline"]);
        drop(second);
        interface.stop(Duration::from_secs(30)).unwrap();
        says(interface.restart(short).unwrap_err(), &["stopped for good", "start another"]);
        let built = interface.ring(Direction::Write).build();
        says(built.unwrap_err(), &["interface is stopped", "start another"]);
    });
}

#[test]
fn a_processor_that_is_not_there_is_named_with_those_that_are() {
    for cpu in [999, 100_000] {
        let error = Poller::builder().cpu(cpu).start().unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{error:?}");
        if cfg!(target_os = "linux") {
            says(&error, &[&format!("the processor {cpu}"), "it may run on ", "counted from 0"]);
        } else {
            says(&error, &["processor", "only Linux"]);
        }
        let interface = embedded("messages: cpu");
        let ring = interface.ring(Direction::Both).cpu(cpu).build();
        assert_eq!(ring.unwrap_err().to_string(), error.to_string());
    }
}

/// The kernel says only that the TAP is busy.
#[cfg(target_os = "linux")]
#[test]
fn a_tap_that_is_opened_twice_in_one_process_is_not_blamed_on_another() {
    use vmring::{Tap, TapError};

    crate::netns::in_namespace(|| {
        let start = || Interface::builder().device(Tap::named("twice")).start();
        let _first = start().unwrap();
        let error = start().unwrap_err();
        assert!(matches!(error, Error::Tap(TapError::TakenHere(_))), "{error:?}");
        says(&error, &["this process uses the TAP 'twice' already", "stop that interface"]);
        says(&error, &["choose another name", "several rings on one interface"]);
    });
}

#[cfg(not(target_os = "macos"))]
#[test]
fn an_interface_that_vmnet_cannot_share_is_named_with_those_that_it_can() {
    use vmnet_sim::World;
    use vmring::{Mode, Vmnet};

    let world = World::new();
    let builder = Interface::builder().mode(Mode::Bridged("en9".to_owned()));
    let error = builder.device(world.enter(Vmnet::new)).start().unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error:?}");
    says(error, &["cannot bridge to 'en9'", "en0, en1"]);
}

/// What a refused submit can say: the cause, and what to do.
#[test]
fn every_refused_submit_says_what_helps() {
    use SubmitErrorKind::*;
    let (len, max, capacity, needed, headroom) = (2000, 1514, 60, 1514, 2);
    for (kind, words) in [
        (SqFull, &["queue is full", "submit again after the next poll"][..]),
        (NoCredit, &["in flight", "reap completions", "greater depth"]),
        (TooBig { len, max }, &["2000 bytes", "at most 1514", "max_packet_size"]),
        (TooSmall { capacity, needed }, &["60 bytes", "1514", "a pool with larger packets"]),
        (NoHeadroom { headroom, needed: 12 }, &["2 bytes in front", "12", "headroom"]),
        (OffloadNotNegotiated, &["InterfaceBuilder::offloads", "vmring::software"]),
        (ForeignPool, &["RingBuilder::pool", "copy the packet"]),
        (Draining, &["drained", "resume"]),
        (Closed(CloseReason::Stopped), &["closed", "build another ring"]),
        (Closed(CloseReason::DevicePanicked), &["the device panicked"]),
        (Closed(CloseReason::Failed(Status::Failure)), &["failed for good", "1001"]),
    ] {
        says(kind, words);
    }
}

#[test]
fn every_status_names_its_cause_and_its_number() {
    for (code, words) in [
        (1001, "gave no reason"),
        (1002, "memory"),
        (1003, "invalid argument"),
        (1004, "not set up yet"),
        (1005, "denied access"),
        (1006, "max_packet_size"),
        (1007, "submit the packet again later"),
        (1008, "more packets than the device takes"),
        (1009, "Internet Sharing"),
        (1010, "entitlement"),
        (4711, "does not know"),
    ] {
        let status = Status::from_code(code).unwrap();
        says(status, &[words, &code.to_string()]);
        // The same sentence, however deep it is.
        let said = status.to_string();
        assert_eq!(EntryError::Device(status).to_string(), said);
        assert_eq!(Error::from(status).to_string(), said);
        assert_eq!(Error::from(EntryError::Device(status)).to_string(), said);
    }
    says(Status::Os(5), &["Input/output error", "os error 5"]);
    says(EntryError::Cancelled, &["a cancel, a restart or a close"]);
    says(EntryError::Abandoned, &["a mistake of the device"]);
    says(EntryError::DevicePanicked, &["panicked"]);
    says(EntryError::NoPacket, &["no packet"]);
}

#[test]
fn every_other_error_says_what_helps() {
    let timeout = Duration::from_secs(2);
    let device = || "tap".to_owned();
    let source = || io::Error::from_raw_os_error(12);
    for (error, words) in [
        (Error::StartTimeout(timeout), &["2s", "InterfaceBuilder::start_timeout"][..]),
        (Error::Timeout(timeout), &["2s", "call it again"]),
        (Error::Leaked { slots: 1, timeout }, &["1 slot within 2s", "may still write to it"]),
        (Error::Leaked { slots: 7, timeout }, &["7 slots within 2s"]),
        (Error::OutOfFrames, &["every frame", "drop some", "RingBuilder::frames"]),
        (Error::Memory { bytes: 9, source: source() }, &["9 bytes", "fewer or smaller frames"]),
        (
            Error::TooManyRings { device: device(), direction: "reading", limit: 1 },
            &["1 reading ring at a time", "is in use", "close one first"],
        ),
        (
            Error::TooManyRings { device: device(), direction: "writing", limit: 2 },
            &["2 writing rings at a time", "are in use"],
        ),
        (Error::StopTimeout { action: "stop", rings: 0, timeout }, &["the device itself"]),
        (
            Error::NotSupported { what: "offload", device: device() },
            &["offload", "tap device", "use another device"],
        ),
        (Error::NeedsMacos { what: "a network object", version: "26" }, &["macOS 26 or later"]),
        (
            ConfigError::PoolTooSmall { capacity: 60, needed: 1514 }.into(),
            &["60 bytes", "1514", "build the pool for packets of that size"],
        ),
        (
            ConfigError::PoolHeadroom { headroom: 0, needed: 12 }.into(),
            &["0 bytes", "12", "PoolBuilder::headroom"],
        ),
        (ConfigError::Zero { what: "read depth" }.into(), &["the read depth must not be 0"]),
    ] {
        says(error, words);
    }
}

/// The messages of wrong settings, as one gets them.
#[test]
fn a_wrong_setting_is_named_with_its_bounds() {
    let interface = Interface::builder().device(Loopback::new(1500)).start().unwrap();
    let ring = || interface.ring(Direction::Both);
    let inline = || ring().drive(Drive::Inline);
    let pool = PoolBuilder::new(4, 60).build().unwrap();
    says(ring().depth(0).build().unwrap_err(), &["read depth", "must not be 0"]);
    says(ring().depth(1 << 20).build().unwrap_err(), &["read depth", "at most", "1048576"]);
    says(inline().cpu(0).build().unwrap_err(), &["the processor cannot be set", "no thread"]);
    says(inline().pool(&pool).build().unwrap_err(), &["max_packet_size", "1514"]);
    says(PoolBuilder::new(0, 60).build().unwrap_err(), &["must not be 0"]);

    let start = |mtu| Interface::builder().mtu(mtu).device(Embedded::network("messages: bounds"));
    says(start(99).start().unwrap_err(), &["an MTU of 99", "from 1280 to 65521"]);
    let dns = Embedded::network("messages: dns").dns([[9, 9, 9, 9].into(); 4]);
    let error = Interface::builder().device(dns).start().unwrap_err();
    says(error, &["4 name servers", "dns", "at most 3"]);
    let ipv6 = Embedded::network("messages: ipv6").ipv6(Some("fe80::".parse().unwrap()));
    let error = Interface::builder().device(ipv6).start().unwrap_err();
    says(error, &["fe80::/64 cannot be the prefix", "fd00::/8"]);
    let lease = Embedded::network("messages: lease").lease_time(Duration::from_secs(1));
    let error = Interface::builder().device(lease).start().unwrap_err();
    says(error, &["lease_time of 1s", "from 10"]);
}

#[test]
fn a_socket_that_cannot_be_used_is_told_what_helps() {
    use vmring::{Socket, SocketError};
    let refused = |socket: Socket| match Interface::builder().device(socket).start() {
        Err(error @ Error::Socket(_)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    says(refused(Socket::stream()), &["no socket", "listen, connect, bound or from_fd"]);
    let long = "/".to_owned() + &"x".repeat(200);
    says(refused(Socket::stream().listen(long)), &["has 201 bytes", "use a shorter one"]);
    says(
        refused(Socket::stream().listen("/dev/null")),
        &["/dev/null", "no socket", "another path"],
    );
    let magic = Socket::stream().connect("x").magic(true);
    says(refused(magic), &["only a datagram socket"]);
    says(SocketError::Taken("x".into()), &["x is the socket", "stop that one"]);
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let wrong = Socket::datagram().from_fd(stream.into());
    says(refused(wrong), &["the descriptor", "no datagram socket"]);
}
