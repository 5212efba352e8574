//! The connection: messages and replies in pieces, and how much is handled at once.

use std::os::fd::AsFd;

use vmring_virtio::vhost_user::Progress;

use crate::frontend::*;
use crate::harness::*;

fn script(events: &Events) -> Vec<Sent> {
    vec![
        Sent::new(GET_PROTOCOL_FEATURES, []),
        Sent::number(SET_PROTOCOL_FEATURES, all_but(&[])),
        Sent::number(SET_FEATURES, FEATURES).need_reply(),
        Sent::table(&[region()]).with(memory(SIZE)).need_reply(),
        Sent::state(SET_VRING_NUM, 0, 256),
        Sent::addresses(0, 0, ring_at(0)),
        events.set_call(0),
        events.set_kick(0).need_reply(),
        Sent::config(GET_CONFIG, 0, 0, &[0; 12]),
        Sent::state(GET_VRING_BASE, 0, 0),
    ]
}

/// Goal: it does not matter in which pieces messages arrive: one byte at a time, several messages at
/// once, or cut anywhere.
#[test]
fn messages_arrive_in_any_pieces() {
    let outcome = |harness: &mut Harness| {
        let replies: Vec<_> = (0..6).map(|_| harness.frontend.reply()).collect();
        assert_eq!(harness.frontend.replied(), 0);
        (replies, harness.calls())
    };
    let whole = {
        let (mut harness, events) = (Harness::new(), Events::new());
        for message in script(&events) {
            harness.frontend.send(&message);
            assert_eq!(harness.process(), Progress::Idle);
        }
        let whole = outcome(&mut harness);
        harness.end();
        whole
    };
    assert_eq!(whole.1.len(), 4);

    let (mut harness, events) = (Harness::new(), Events::new());
    for message in script(&events) {
        let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        for (place, byte) in message.bytes().iter().enumerate() {
            let fds = if place == 0 { &fds[..] } else { &[] };
            harness.frontend.send_bytes(&[*byte], fds).expect("it is sent");
            assert_eq!(harness.process(), Progress::Idle);
        }
    }
    assert_eq!(outcome(&mut harness), whole, "byte by byte");
    harness.end();

    let (mut harness, events) = (Harness::new(), Events::new());
    script(&events).iter().for_each(|message| harness.frontend.send(message));
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(outcome(&mut harness), whole, "all at once");
    harness.end();

    // Two messages in one piece: the descriptors belong to the second.
    let (mut harness, events) = (Harness::running(), Events::new());
    let first = Sent::new(SET_OWNER, []).bytes();
    harness.frontend.send_bytes(&first[..5], &[]).expect("it is sent");
    let second = events.set_call(0);
    harness.frontend.send_bytes(&first[5..], &[]).expect("it is sent");
    harness.frontend.send(&second);
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(harness.calls(), [Call::Interrupt(0, true)]);
    drop(second);
    harness.end();
}

/// Goal: a front end that does not read its replies is not handled any further, loses no reply, and
/// makes nothing grow.
#[test]
fn a_front_end_that_does_not_read_waits() {
    let mut harness = Harness::negotiated();
    let mut sent = 0;
    let blocked = loop {
        harness.frontend.send(&Sent::config(GET_CONFIG, 0, sent, &[0; 200]));
        sent += 1;
        match harness.process() {
            Progress::Idle => assert!(sent < 100_000, "the socket has an end"),
            progress => break progress,
        }
    };
    assert_eq!(blocked, Progress::Blocked);
    let handled = harness.session.stats().messages;
    for _ in 0..10 {
        harness.frontend.send(&Sent::config(GET_CONFIG, 0, sent, &[0; 200]));
        sent += 1;
        assert_eq!(harness.process(), Progress::Blocked);
    }
    assert_eq!(harness.session.stats().messages, handled, "nothing is handled meanwhile");
    for flags in 0..sent {
        if harness.frontend.replied() == 0 {
            while harness.process() == Progress::More {}
        }
        assert_eq!(harness.frontend.reply().payload[8..12], flags.to_ne_bytes());
    }
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(harness.frontend.replied(), 0);
    harness.end();
}

/// Goal: a front end that sends without an end leaves time for others.
#[test]
fn one_call_handles_a_bounded_number_of_messages() {
    let mut harness = Harness::negotiated();
    let before = harness.session.stats().messages;
    for _ in 0..200 {
        harness.frontend.send(&Sent::new(SET_OWNER, []));
    }
    for calls in 1..=3 {
        assert_eq!(harness.process(), Progress::More);
        assert_eq!(harness.session.stats().messages, before + calls * 64);
    }
    assert_eq!(harness.process(), Progress::Idle);
    assert_eq!(harness.session.stats().messages, before + 200);
    harness.end();
}

/// Goal: a front end that goes, with replies unread or not, has closed the connection; it is no
/// error, and no signal ends the process.
#[test]
fn a_front_end_that_goes_closes_the_connection() {
    for (unread, unsent) in [(0, 0), (3, 0), (0, 3), (3, 3)] {
        let mut harness = Harness::running();
        for _ in 0..unread {
            harness.frontend.send(&Sent::new(GET_FEATURES, []));
            assert_eq!(harness.process(), Progress::Idle);
        }
        for _ in 0..unsent {
            harness.frontend.send(&Sent::new(GET_FEATURES, []));
        }
        let (other, _) = Frontend::pair();
        drop(std::mem::replace(&mut harness.frontend, other));
        assert_eq!(harness.process(), Progress::Closed, "{unread} {unsent}");
        assert_eq!(harness.process(), Progress::Closed);
        assert_eq!(harness.session.backend().rings.len(), 2, "the owner ends them");
        harness.end();
    }
}

/// Goal: descriptors that arrive do not go to programs that this one starts.
#[test]
fn descriptors_are_closed_on_exec() {
    use std::os::fd::AsRawFd;
    let harness = Harness::running();
    let ring = &harness.session.backend().rings[&0];
    for event in [&ring.kick, &ring.call] {
        let fd = event.as_ref().expect("an event").as_fd().as_raw_fd();
        // SAFETY: the call takes numbers only.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
    harness.end();
}

/// Goal: a front end that reads nothing more raises no signal that would end a program in C, by its
/// socket, a call event, its channel or a transfer. Method: a handler counts the signals of this
/// thread.
#[test]
fn a_reader_that_is_gone_raises_no_signal() {
    use std::io::{Write, pipe};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering};
    static THREAD: AtomicUsize = AtomicUsize::new(0);
    static SIGNALS: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn count(_signal: libc::c_int) {
        // SAFETY: the function only tells who calls it.
        if unsafe { libc::pthread_self() } as usize == THREAD.load(Ordering::Relaxed) {
            SIGNALS.fetch_add(1, Ordering::Relaxed);
        }
    }
    // SAFETY: the function only tells who calls it.
    THREAD.store(unsafe { libc::pthread_self() } as usize, Ordering::Relaxed);
    // SAFETY: the handler uses atomics and a function that a handler may call.
    unsafe { libc::signal(libc::SIGPIPE, count as *const () as libc::sighandler_t) };

    let mut harness = Harness::running();
    let gone = || pipe().expect("a pipe").1;
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(gone()));
    let (_, call) = UnixStream::pair().expect("sockets");
    harness.tell(Sent::number(SET_VRING_CALL, 1).with(call));
    let (own, other) = UnixStream::pair().expect("sockets");
    assert_eq!(harness.number(Sent::new(SET_BACKEND_REQ_FD, []).with(other).need_reply()), 0);
    drop(own);
    assert!(!harness.session.notify_config());
    for index in 0..2 {
        harness.ask(Sent::state(GET_VRING_BASE, index, 0));
    }
    harness.number(Sent::state(SET_DEVICE_STATE_FD, 0, 0).with(gone()));
    harness.frontend.send(&Sent::new(GET_FEATURES, []));
    let (frontend, _) = Frontend::pair();
    drop(std::mem::replace(&mut harness.frontend, frontend));
    assert_eq!(harness.process(), Progress::Closed);
    assert_eq!(SIGNALS.load(Ordering::Relaxed), 0);
    harness.end();

    // Without such care there is one.
    assert!(gone().write_all(b"x").is_err());
    assert_eq!(SIGNALS.load(Ordering::Relaxed), 1);
}
