//! How flows end: half by half, by reset, by silence.

use crate::support::script::each_way;

/// T5: FIN is sent again, with the data in front of it that is not acknowledged.
#[test]
fn fin_is_sent_again_with_its_data() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 1500
            > . 1:1001 ack 1
            > . 1001:1501 ack 1
            peer finishes
            > F. 1501 ack 1
            wait 420
            > . 1:1001 ack 1
            nothing
            < . 1 ack 1001 win 512
            > F. 1001:1501 ack 1
            < . 1 ack 1501 win 512
            wait 420
            > F. 1501 ack 1
            < . 1 ack 1502 win 512
            nothing
            wait 5000
            nothing
            ",
        );
    });
}

/// Goal: an end that is known with the last bytes is told with them, also when they are sent again.
#[test]
fn fin_comes_with_the_last_bytes() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 1500 and finishes
            > . 1:1001 ack 1
            > FP. 1001:1501 ack 1
            wait 420
            > . 1:1001 ack 1
            < . 1 ack 1001 win 512
            > F. 1001:1501 ack 1
            nothing
            < . 1 ack 1502 win 512
            < F. 1 ack 1502 win 512
            > . 1502 ack 2
            peer got close
            wait 61000
            empty
            ",
        );
    });
}

/// Goal: FIN does not go with bytes that fill the window, and comes when there is space.
#[test]
fn fin_waits_for_space_behind_the_last_bytes() {
    each_way(|script| {
        script.open().run(
            "
            < . 1 ack 1 win 4
            peer writes 512 and finishes
            > . 1:513 ack 1
            nothing
            < . 1 ack 513 win 4
            > F. 513 ack 1
            < . 1 ack 514 win 4
            nothing
            ",
        );
    });
}

/// Goal: bytes that a reset follows reach the guest before the reset does.
#[test]
fn a_reset_behind_the_last_bytes_comes_after_them() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 500 before a reset
            > . 1:501 ack 1
            > R. 501 ack 1
            empty
            ",
        );
    });
}

/// Goal: a socket whose peer has ended first is closed by one call when the guest ends.
#[test]
fn the_second_end_needs_no_shutdown() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:101 ack 1 win 512
            > . 1 ack 101
            peer writes 500 and finishes
            > F. 1:501 ack 101
            < F. 101 ack 502 win 512
            peer got close
            > . 502 ack 102
            wait 61000
            empty
            ",
        );
        assert!(!script.net.kernel.with(0, |peer| peer.shut), "a shutdown just before the close");
    });
}

/// Goal: a flow whose guest acknowledges what was found before more comes needs no peek offset.
#[test]
fn acknowledged_answers_need_no_peek_offset() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 500
            > . 1:501 ack 1
            wait 420
            > . 1:501 ack 1
            < . 1 ack 501 win 512
            peer writes 500
            > . 501:1001 ack 1
            < . 1 ack 1001 win 512
            ",
        );
        assert_eq!(script.net.kernel.calls().set_peek_offset, 0);
        // Bytes behind others that are not acknowledged do.
        let peeks = script.net.kernel.calls().peek > 0;
        script.run("peer writes 500\n > . 1001:1501 ack 1\n peer writes 500\n > . 1501:2001 ack 1");
        assert_eq!(script.net.kernel.calls().set_peek_offset, usize::from(peeks));
        script.run("< . 1 ack 2001 win 512\n peer writes 500\n > . 2001:2501 ack 1");
        assert_eq!(script.net.kernel.calls().set_peek_offset, usize::from(peeks));
    });
}

/// T5: a window with little space behind the data has space for FIN.
#[test]
fn fin_needs_little_space() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 500
            peer finishes
            > . 1:501 ack 1
            > F. 501 ack 1
            // 512 bytes, of which 500 are the data.
            < . 1 ack 1 win 4
            wait 420
            > F. 1:501 ack 1
            ",
        );
    });
}

/// T5: FIN counts only behind the last byte. A FIN of elsewhere ends nothing.
#[test]
fn fin_of_elsewhere_ends_nothing() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:11 ack 1 win 512
            > . 1 ack 11
            // Bytes are missing in front.
            < F. 21 ack 1 win 512
            > . 1 ack 11
            peer got no fin
            < F. 5:9 ack 1 win 512
            > . 1 ack 11
            peer got no fin
            < P. 11:21 ack 1 win 512
            & F. 21 ack 1 win 512
            > . 1 ack 22
            peer got 20
            peer got fin
            // It is sent again, because the acknowledgment was lost.
            < F. 21 ack 1 win 512
            > . 1 ack 22
            // Nothing comes behind FIN.
            < P. 22:30 ack 1 win 512
            > . 1 ack 22
            peer got 20
            ",
        );
    });
}

/// T6: after the guest has closed its half, the other half goes on for many windows.
#[test]
fn a_half_closed_by_the_guest_leaves_the_other() {
    each_way(|script| {
        script.open().run(
            "
            < F. 1 ack 1 win 0
            peer got fin
            > . 1 ack 2
            < . 2 ack 1 win 16
            ",
        );
        let mut at = 1;
        for _ in 0..50 {
            script.run(&format!(
                "
                peer writes 2000
                > . {at}:{} ack 2
                > . {}:{} ack 2
                < . 2 ack {} win 0
                nothing
                < . 2 ack {} win 16
                ",
                at + 1000,
                at + 1000,
                at + 2000,
                at + 2000,
                at + 2000
            ));
            at += 2000;
        }
        script.run(&format!(
            "
            peer finishes
            > F. {at} ack 2
            < . 2 ack {} win 16
            peer got close
            empty
            ",
            at + 1
        ));
    });
}

/// T6 the other way round: after the peer has closed its half, the guest's goes on.
#[test]
fn a_half_closed_by_the_peer_leaves_the_other() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 10
            > . 1:11 ack 1
            peer finishes
            > F. 11 ack 1
            < . 1 ack 12 win 512
            ",
        );
        let mut at = 1;
        for _ in 0..300 {
            script.run(&format!("< P. {at}:{} ack 12 win 512", at + 1000));
            at += 1000;
            script.run(&format!("> . 12 ack {at}\n peer reads 1000\n nothing"));
        }
        script.run(&format!(
            "
            peer got 300000
            < F. {at} ack 12 win 512
            > . 12 ack {}
            peer got fin
            peer got close
            // The guest sends it again, because the acknowledgment was lost.
            < F. {at} ack 12 win 512
            > . 12 ack {}
            wait 1100
            nothing
            empty
            ",
            at + 1,
            at + 1
        ));
    });
}

/// Goal: what a socket tells again behind the end of the stream, as it does whenever it is asked to tell
/// that it takes bytes, is no reason to ask the guest for a window, or to end the flow.
#[test]
fn an_end_that_is_told_again_is_no_news() {
    each_way(|script| {
        script.open().run(
            "
            peer finishes
            > F. 1 ack 1
            < . 1 ack 2 win 512
            ",
        );
        for _ in 0..40 {
            script.run(
                "
                peer finishes
                wait 50000
                nothing
                < . 0 ack 2 win 512
                > . 2 ack 1
                ",
            );
        }
        script.run("peer is open\n count WindowProbe 0\n count GuestSilent 0");
    });
}

/// T7: a clean end leaves nothing unread, so the peer gets no reset.
#[test]
fn a_clean_end_is_no_reset() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 500
            peer finishes
            > . 1:501 ack 1
            > F. 501 ack 1
            < F. 1 ack 1 win 512
            > . 502 ack 2
            peer is open
            < . 2 ack 502 win 512
            peer got close
            wait 1100
            empty
            ",
        );
        assert_eq!(script.net.kernel.with(0, |peer| peer.unread), 0);
    });
}

/// T7: a reset of the guest is a reset for the peer, whatever is on its way.
#[test]
fn a_reset_of_the_guest_is_a_reset() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 500
            > . 1:501 ack 1
            < R 1
            peer got reset
            count GuestReset 1
            nothing
            empty
            // What comes late belongs to nothing.
            < . 1 ack 501 win 512
            > R 501
            count NoFlow 1
            < R 1
            nothing
            < F 1
            > R. 0 ack 2
            ",
        );
    });
}

/// Goal: a guest that forgets a flow in which everything was said costs the peer nothing that is on its
/// way.
#[test]
fn a_reset_after_everything_was_said_is_an_end() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:11 ack 1 win 512
            & F. 11 ack 1 win 512
            > . 1 ack 12
            peer finishes
            > F. 1 ack 12
            wait 420
            > F. 1 ack 12
            < R 12
            peer got 10
            peer got close
            empty
            ",
        );
    });
}

/// Section 9, 2 and 3b: the end of the stream is noted when it is told, and FIN comes when everything
/// else was sent.
#[test]
fn the_end_is_noted_while_the_window_is_closed() {
    each_way(|script| {
        script.open().run(
            "
            < . 1 ack 1 win 0
            peer writes 500
            peer finishes
            nothing
            < . 1 ack 1 win 2
            > . 1:257 ack 1
            nothing
            < . 1 ack 257 win 2
            > F. 257:501 ack 1
            < . 1 ack 502 win 0
            < F. 1 ack 502 win 0
            > . 502 ack 2
            peer got close
            ",
        );
    });
}

/// Section 10, P5: FIN may have to wait for a window too.
#[test]
fn fin_waits_for_a_window() {
    each_way(|script| {
        script.open().run(
            "
            < . 1 ack 1 win 0
            peer finishes
            nothing
            wait 450
            > . 0 ack 1
            < . 1 ack 1 win 0
            < . 1 ack 1 win 1
            > F. 1 ack 1
            ",
        );
    });
}

/// T8: a guest that has forgotten a flow is found out, by a question that it answers with a reset.
#[test]
fn a_guest_that_has_forgotten_is_found_out() {
    each_way(|script| {
        script.open().run(
            "
            < F. 1 ack 1 win 512
            > . 1 ack 2
            peer got fin
            wait 60100
            > . 0 ack 2
            < R 2
            peer got reset
            empty
            ",
        );
    });
}

/// T8: a silent guest is asked, and keeps its flow as long as it answers. One that does not answer loses
/// it after two hours. Whether the peer is there, the host's kernel finds out.
#[test]
fn an_idle_flow_ends_after_two_hours_without_an_answer() {
    each_way(|script| {
        script.open();
        for round in 0..200 {
            assert_eq!(script.net.kernel.calls().keep_alive, usize::from(round > 0));
            script.run("wait 60100\n > . 0 ack 1\n < . 1 ack 1 win 512");
        }
        script.run("peer is open\n wait 7100000\n peer is open\n wait 120000\n peer got reset");
        script.run("count IdleTimeout 1\n empty");
    });
}

/// Both close at once.
#[test]
fn both_may_close_at_once() {
    each_way(|script| {
        script.open().run(
            "
            peer finishes
            > F. 1 ack 1
            // This was sent before FIN came.
            < F. 1 ack 1 win 512
            > . 2 ack 2
            < . 2 ack 2 win 512
            peer got close
            < F. 1 ack 1 win 512
            > . 2 ack 2
            wait 1100
            empty
            < F. 1 ack 1 win 512
            > R 1
            ",
        );
    });
}

/// Reuse of a tuple: a guest may use the ports of a flow again that has just ended.
#[test]
fn a_tuple_is_used_again_at_once() {
    each_way(|script| {
        for _ in 0..5 {
            script.open().run(
                "
                peer finishes
                > F. 1 ack 1
                < F. 1 ack 2 win 512
                > . 2 ack 2
                peer got close
                ",
            );
            script.isn = script.isn.wrapping_add(3000);
        }
        assert_eq!(script.net.nat.usage().0, 1);
        script.run("count Restarted 0\n wait 1100\n empty");
    });
}

/// Goal: a port that leaves and a translator that stops leave nothing behind.
#[test]
fn what_stops_leaves_nothing_behind() {
    each_way(|script| {
        script.open();
        let (now, out) = (script.net.now, &mut script.net.out);
        script.net.nat.port_left(crate::support::port::PORT, now, out);
        script.run("nothing\n peer got reset\n empty");
        script.isn = script.isn.wrapping_add(1 << 30);
        script.open();
        let (now, out) = (script.net.now, &mut script.net.out);
        script.net.nat.close(now, out);
        script.run("> R. 1 ack 1\n peer got reset\n empty");
    });
}
