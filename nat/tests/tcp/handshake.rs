//! How flows begin, in both directions.

use std::cell::RefCell;
use std::time::Duration;

use vmring_nat::{Readiness, SocketError};

use crate::support::kernel::Answer;
use crate::support::port::{config, plain_link};
use crate::support::script::{Script, each_way};

/// Goal: a connection is made, carries data both ways, and ends.
/// Method: the shortest life of a flow, with the guest closing first.
#[test]
fn a_connection_carries_data_both_ways_and_ends() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:101 ack 1 win 512
            peer got 100
            > . 1 ack 101
            peer writes 2500
            > . 1:1001 ack 101
            > . 1001:2001 ack 101
            > . 2001:2501 ack 101
            < . 101 ack 2501 win 512
            < F. 101 ack 2501 win 512
            peer got fin
            > . 2501 ack 102
            peer finishes
            > F. 2501 ack 102
            < . 102 ack 2502 win 512
            peer got close
            nothing
            count TcpOpened 1
            count TcpEstablished 1
            count TcpBytesSent 100
            count TcpBytesReceived 2500
            empty
            ",
        );
    });
}

/// Goal: the guest gets no answer before the host has connected, and the same answers a host of its
/// own would give.
#[test]
fn refused_is_a_reset_and_unreachable_is_icmp() {
    let codes = |v6| {
        if v6 {
            [
                ("network", "1 0"),
                ("host", "1 3"),
                ("time", "1 3"),
                ("denied", "1 1"),
                ("port", "1 3"),
            ]
        } else {
            [
                ("network", "3 0"),
                ("host", "3 1"),
                ("time", "3 1"),
                ("denied", "3 13"),
                ("port", "3 1"),
            ]
        }
    };
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1460 ws 7
            peer refuses
            > R. 0 ack 1
            count ConnectRefused 1
            empty
            ",
        );
        for (why, icmp) in codes(script.guest.is_ipv6()) {
            script.run(&format!(
                "
                < S 0 win 65535 mss 1460 ws 7
                nothing
                peer fails {why}
                > icmp {icmp}
                nothing
                empty
                ",
            ));
        }
        // The same if the call itself fails.
        script.net.kernel.0.borrow_mut().answer = Answer::Fail(SocketError::Refused);
        script.run("< S 0 win 65535\n > R. 0 ack 1");
        script.net.kernel.0.borrow_mut().answer = Answer::Fail(SocketError::NoDescriptor);
        let code = codes(script.guest.is_ipv6())[1].1;
        script.run(&format!("< S 0 win 65535\n > icmp {code}\n count NoDescriptor 1\n empty"));
        script.run("count NoFlow 0\n count ConnectRefused 2");
    });
}

/// T11: a SYN that is sent again is ignored while the host connects, and answered again afterwards.
#[test]
fn a_repeated_syn_opens_nothing_and_resets_nothing() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            < S 0 win 65535 mss 1000 ws 7
            nothing
            peer connects
            > S. 0 ack 1
            < S 0 win 65535 mss 1000 ws 7
            > S. 0 ack 1
            < . 1 ack 1 win 512
            // A duplicate of the first SYN arrives late.
            < S 0 win 65535 mss 1000 ws 7
            > . 1 ack 1
            count TcpOpened 1
            < P. 1:11 ack 1 win 512
            > . 1 ack 11
            peer got 10
            ",
        );
    });
}

/// RFC 6528, 3: nobody who knows one flow's sequence knows another's. The same addresses and ports begin
/// behind where an earlier flow of them has begun.
#[test]
fn sequences_begin_at_no_known_place() {
    let begin = |script: &mut Script, port| {
        script.guest.set_port(port);
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            > S. 0 ack 1
            < R 1
            peer got reset
            ",
        );
        script.iss
    };
    let known = RefCell::new(Vec::new());
    each_way(|script| {
        let (first, other) = (begin(script, 40_000), begin(script, 40_001));
        known.borrow_mut().extend([first, other]);
        script.run("wait 1000");
        // One number every 4 microseconds.
        assert_eq!(begin(script, 40_000).wrapping_sub(first), 250_000);
    });
    let mut known = known.into_inner();
    known.sort_unstable();
    known.dedup();
    assert_eq!(known.len(), 8, "each flow of each translator begins elsewhere");
}

/// Goal: SYN,ACK is sent again until the guest answers, and the flow ends if it never does.
#[test]
fn syn_ack_is_sent_again() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            > S. 0 ack 1
            wait 900
            nothing
            wait 200
            > S. 0 ack 1
            wait 2100
            > S. 0 ack 1
            wait 60000
            > S. 0 ack 1
            > S. 0 ack 1
            > S. 0 ack 1
            wait 60000
            nothing
            peer got reset
            count GuestSilent 1
            empty
            ",
        );
    });
}

/// S7: an attempt to connect ends after 30 s of our own.
#[test]
fn an_attempt_to_connect_times_out() {
    each_way(|script| {
        let icmp = if script.guest.is_ipv6() { "1 3" } else { "3 1" };
        script.run(&format!(
            "
            < S 0 win 65535
            wait 29000
            nothing
            wait 1100
            > icmp {icmp}
            count ConnectTimedOut 1
            empty
            ",
        ));
    });
}

/// Section 9, 1: only a connection that is made is answered. A socket that is told of as closed
/// before it has connected is still connecting.
#[test]
fn an_event_alone_is_no_connection() {
    each_way(|script| {
        script.run("< S 0 win 65535");
        let token = script.net.kernel.with(0, |peer| peer.token);
        let early = Readiness {
            writable: true,
            closed: true,
            failed: true,
            readable: true,
            ..Readiness::default()
        };
        let (now, out) = (script.net.now, &mut script.net.out);
        script.net.nat.on_ready(token, early, now, out);
        script.run(
            "
            nothing
            peer connects
            > S. 0 ack 1
            ",
        );
    });
}

/// Section 9, 13 and T11: a guest that begins again with the same addresses and ports gets a new flow,
/// and the old peer a reset. A SYN within the window of a living flow gets an acknowledgment.
#[test]
fn a_guest_that_begins_again_gets_a_new_flow() {
    each_way(|script| {
        script.open();
        // While it is connecting, too.
        script.isn = script.isn.wrapping_add(0x2000_0000);
        script.run("< S 0 win 65535 mss 1000 ws 7");
        let closed = |script: &Script, index| script.net.kernel.with(index, |peer| peer.closed);
        assert_eq!((closed(script, 0), closed(script, 1)), (Some(true), None));
        script.isn = script.isn.wrapping_add(0x2000_0000);
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            nothing
            peer connects
            > S. 0 ack 1
            < . 1 ack 1 win 512
            < P. 1:11 ack 1 win 512
            > . 1 ack 11
            peer got 10
            count Restarted 2
            ",
        );
        assert_eq!((closed(script, 1), closed(script, 2)), (Some(true), None));
        script.run(
            "
            < S 500 win 65535
            > . 1 ack 11
            peer is open
            // Where the guest has forgotten the flow, it answers with a reset, and begins again.
            < R 11
            peer got reset
            < S 500 win 65535
            count TcpOpened 4
            ",
        );
    });
}

/// T11: a reset or FIN and the next SYN of the same addresses and ports may be in one batch.
#[test]
fn an_end_and_a_beginning_may_be_in_one_batch() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:11 ack 1 win 512
            & R 11
            & S 5000 win 65535 mss 1000 ws 7
            peer is open
            ",
        );
        assert_eq!(script.net.kernel.len(), 2);
        script.isn = script.isn.wrapping_add(5000);
        script.run(
            "
            peer connects
            > S. 0 ack 1
            < . 1 ack 1 win 512
            peer finishes
            > F. 1 ack 1
            < . 1 ack 2 win 512
            < P. 1:11 ack 2 win 512
            & F. 11 ack 2 win 512
            & S 5000 win 65535 mss 1000 ws 7
            ",
        );
        assert_eq!(script.net.kernel.len(), 3);
        // The second flow has got its data and its end first.
        let (sent, closed) = script.net.kernel.with(1, |peer| (peer.sent.len(), peer.closed));
        assert_eq!((sent, closed), (10, Some(false)));
    });
}

/// Section 9, 5 and 6: what the guest says of itself is taken with care: a segment size of 0, a
/// shift of 200, a window that is not scaled in SYN.
#[test]
fn options_of_a_syn_are_taken_with_care() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 200 mss 0 ws 200
            peer connects
            > S. 0 ack 1 ws 8
            peer writes 3000
            < . 1 ack 1 win 200
            > . 1:537 ack 1
            > . 537:1073 ack 1
            > . 1073:1609 ack 1
            > . 1609:2145 ack 1
            > . 2145:2681 ack 1
            > . 2681:3001 ack 1
            < R 1
            ",
        );
        // A guest that does not scale its windows is offered none that is scaled.
        script.isn = script.isn.wrapping_add(1 << 30);
        script.run(
            "
            < S 0 win 1000
            peer connects
            > S. 0 ack 1 win 65535
            ",
        );
        script.run("< . 1 ack 1 win 1000\n peer writes 2000");
        let mss = if script.guest.is_ipv6() { 1000 } else { 536 };
        script.run(&format!("> . 1:{} ack 1 win 65535", 1 + mss));
    });
}

/// Goal: a guest that gives up while the host connects ends the attempt.
#[test]
fn a_reset_ends_an_attempt_to_connect() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535
            < R 500
            peer is open
            < R. 1
            peer got reset
            empty
            nothing
            ",
        );
    });
}

/// RFC 9293, 3.10.7.4: an answer to SYN,ACK that acknowledges something else gets a reset, and the flow
/// goes on.
#[test]
fn a_wrong_answer_to_syn_ack_gets_a_reset() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            > S. 0 ack 1
            < . 1 ack 900 win 512
            > R 900
            < . 1 ack 1 win 512
            < P. 1:11 ack 1 win 512
            > . 1 ack 11
            ",
        );
    });
}

/// Goal: the host's connection may fail before the guest has completed its handshake.
#[test]
fn a_peer_may_be_gone_before_the_guest_answers() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            > S. 0 ack 1
            peer resets
            > R. 1 ack 1
            empty
            < . 1 ack 1 win 512
            > R 1
            ",
        );
        // Or have said everything.
        script.isn = script.isn.wrapping_add(1 << 30);
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            peer writes 10
            peer finishes
            > S. 0 ack 1
            nothing
            < . 1 ack 1 win 512
            > F. 1:11 ack 1
            ",
        );
    });
}

fn accept(script: &mut Script) {
    script.net.accept(script.remote, script.guest);
}

/// Goal: a peer's connection reaches the guest. T11: the guest's SYN,ACK is acknowledged at once, also
/// if nothing else is to be sent, and what the peer has sent before is delivered.
#[test]
fn a_peer_connects_to_a_guest() {
    each_way(|script| {
        accept(script);
        script.run(
            "
            > S 0 ws 8
            peer writes 10
            nothing
            < S. 0 ack 1 win 65535 mss 1000 ws 7
            > . 1:11 ack 1
            < . 1 ack 11 win 512
            < P. 1:11 ack 11 win 512
            > . 11 ack 11
            peer got 10
            < F. 11 ack 11 win 512
            > . 11 ack 12
            peer finishes
            > F. 11 ack 12
            < . 12 ack 12 win 512
            peer got close
            empty
            ",
        );
        script.isn = script.isn.wrapping_add(1 << 30);
        accept(script);
        script.run(
            "
            > S 0 ws 8
            < S. 0 ack 1 win 65535 mss 1000 ws 7
            > . 1 ack 1
            ",
        );
        // By itself, and not by an event of the socket.
        assert_eq!(script.net.kernel.calls().arm_writable, 0);
    });
}

/// T11: SYN to a guest is sent again, because it may not be up yet. A guest that refuses or never
/// answers ends the peer's connection.
#[test]
fn a_guest_may_answer_late_or_refuse() {
    each_way(|script| {
        accept(script);
        script.run(
            "
            > S 0
            wait 1100
            > S 0
            wait 2100
            > S 0
            // An answer to something else, such as an old connection's.
            < . 1 ack 700 win 512
            > R 700
            peer is open
            < R. 0 ack 1
            peer got reset
            count GuestReset 1
            empty
            ",
        );
        accept(script);
        script.run("> S 0\n wait 200000");
        assert_eq!(script.net.out.frames.len(), 5, "SYN again");
        script.run("peer got reset\n empty");
        script.net.out.frames.clear();
        assert_eq!(script.net.now, Duration::from_millis(1_203_200) + Duration::ZERO);
    });
}

/// Goal: a connection that a peer makes from an address and port that the guest has in use is refused,
/// and the flow that there is goes on.
#[test]
fn a_tuple_is_used_once() {
    let mut script = Script::new(config(false), plain_link(), false);
    script.open();
    let socket = script.net.kernel.accepted(script.remote);
    let index = socket.index;
    let guest = (script.guest, crate::support::port::GUEST_MAC);
    let (port, now) = (crate::support::port::PORT, script.net.now);
    let result = script.net.nat.accept_tcp(
        socket,
        script.remote,
        port,
        guest,
        script.remote,
        now,
        &mut script.net.out,
    );
    assert!(result.is_err());
    assert_eq!(script.net.kernel.with(index, |peer| peer.closed), Some(true));
    assert_eq!(script.net.nat.usage(), (1, 1));
    script.run("nothing");
}
