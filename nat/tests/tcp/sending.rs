//! From the world to the guest: data, losses, and windows of the guest.

use vmring_nat::Nat;

use crate::support::kernel::Kernel;
use crate::support::port::{config, plain_link};
use crate::support::script::{Script, each_way, from_world, stream};

/// T1: a look at the socket that finds nothing new while bytes are not acknowledged is not repeated.
/// T2: nor is one while the guest's window is closed.
#[test]
fn no_socket_is_looked_at_again_and_again() {
    each_way(|script| {
        script.open().run("peer writes 500\n > . 1:501 ack 1");
        let looks = |script: &crate::support::script::Script| {
            let calls = script.net.kernel.calls();
            calls.peek + calls.receive
        };
        let before = looks(script);
        script.run("wait 200\n nothing");
        assert_eq!(looks(script), before, "T1");
        // An event without a reason causes one look, and no more.
        script.run("peer writes 0\n nothing");
        assert_eq!(looks(script), before + 1, "T1");
        script.run("wait 100\n nothing");
        assert_eq!(looks(script), before + 1, "T1");
        // Nor does what the guest sends meanwhile.
        script.run("< . 1 ack 201 win 512\n nothing");
        assert_eq!(looks(script), before + 1, "T1");
        script.run(
            "
            < . 1 ack 501 win 0
            peer writes 100000
            peer finishes
            nothing
            ",
        );
        let before = looks(script);
        script.run("wait 60000");
        assert_eq!(looks(script), before, "T2");
        // Nothing but probes has come.
        while let Some(segment) = script.next() {
            assert!(segment.data.is_empty() && segment.flags == ".");
            assert_eq!(segment.seq, script.iss.wrapping_add(500));
        }
    });
}

/// T4: a guest that closes its window has dropped what it has not acknowledged.
#[test]
fn a_closed_window_rewinds() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 3000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            < . 1 ack 1001 win 0
            nothing
            // It opens its window, and has nothing of what was sent.
            < . 1 ack 1001 win 512
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            < . 1 ack 3001 win 512
            count WindowRewind 1
            ",
        );
    });
}

/// T4: a guest that takes back a part of its window has dropped what is behind it.
#[test]
fn a_window_that_shrinks_rewinds_to_its_edge() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 5000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            > . 3001:4001 ack 1
            > . 4001:5001 ack 1
            // 16 times 128 bytes behind 1001: up to 3049.
            < . 1 ack 1001 win 16
            nothing
            < . 1 ack 3001 win 512
            // 3049 to 3001 was in doubt; what is behind the old edge comes again.
            > . 3049:4049 ack 1
            > . 4049:5001 ack 1
            ",
        );
    });
}

/// T12 and section 8: a window that stays closed is asked for, at longer and longer intervals, and for
/// as long as the guest answers.
#[test]
fn a_closed_window_is_probed() {
    each_way(|script| {
        script.open().run(
            "
            < . 1 ack 1 win 0
            peer writes 500
            nothing
            wait 450
            > . 0 ack 1
            < . 1 ack 1 win 0
            wait 850
            > . 0 ack 1
            < . 1 ack 1 win 0
            ",
        );
        for _ in 0..30 {
            script.run("wait 61000");
            let probe = script.next().expect("a probe");
            assert_eq!((probe.seq, probe.data.len()), (script.iss, 0));
            while script.next().is_some() {}
            script.run("< . 1 ack 1 win 0");
        }
        script.run(
            "
            < . 1 ack 1 win 512
            > . 1:501 ack 1
            < . 1 ack 501 win 512
            ",
        );
        // One that does not answer is given up.
        script.run("< . 1 ack 501 win 0\n peer writes 10\n wait 1200000\n peer got reset\n empty");
    });
}

/// Goal: a lost frame is sent again after duplicate acknowledgments: fewer if fewer frames are on their
/// way. What is sent again by mistake does not cause more of it.
#[test]
fn duplicate_acknowledgments_rewind_once() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 6000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            > . 3001:4001 ack 1
            > . 4001:5001 ack 1
            > . 5001:6001 ack 1
            // The second is lost.
            < . 1 ack 1001 win 512
            < . 1 ack 1001 win 512
            < . 1 ack 1001 win 512
            nothing
            < . 1 ack 1001 win 512
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            > . 3001:4001 ack 1
            > . 4001:5001 ack 1
            > . 5001:6001 ack 1
            count FastRetransmit 1
            // The answers to those that the guest had.
            < . 1 ack 6001 win 512
            peer writes 3000
            > . 6001:7001 ack 1
            > . 7001:8001 ack 1
            > . 8001:9001 ack 1
            < . 1 ack 6001 win 512
            < . 1 ack 6001 win 512
            < . 1 ack 6001 win 512
            nothing
            count FastRetransmit 1
            < . 1 ack 9001 win 512
            // With two on their way, one answer is all there will be.
            peer writes 2000
            > . 9001:10001 ack 1
            > . 10001:11001 ack 1
            < . 1 ack 9001 win 512
            > . 9001:10001 ack 1
            > . 10001:11001 ack 1
            count FastRetransmit 2
            < . 1 ack 11001 win 512
            // With one on its way, an answer means nothing.
            peer writes 500
            > . 11001:11501 ack 1
            < . 1 ack 11001 win 512
            nothing
            ",
        );
    });
}

/// Goal: what is not acknowledged in time is sent again, one segment at first, at longer and longer
/// intervals, and the flow ends if there is never an answer.
#[test]
fn a_timeout_rewinds() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 2000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            wait 390
            nothing
            wait 20
            > . 1:1001 ack 1
            nothing
            wait 820
            > . 1:1001 ack 1
            nothing
            count TimeoutRetransmit 2
            < . 1 ack 1001 win 512
            > . 1001:2001 ack 1
            < . 1 ack 2001 win 512
            peer writes 1000
            > . 2001:3001 ack 1
            wait 420
            > . 2001:3001 ack 1
            wait 1200000
            peer got reset
            count GuestSilent 1
            empty
            ",
        );
        let mut last = None;
        while let Some(segment) = script.next() {
            last = Some(segment.flags);
        }
        assert_eq!(last.as_deref(), Some("R."));
    });
}

/// Goal: if the last acknowledgments are lost, or the last segments, that is found out soon: the last segment is
/// sent again, once, and its answer tells which of both it was (RFC 8985, 7).
#[test]
fn a_lost_tail_is_found_out_soon() {
    each_way(|script| {
        script.open().run(
            "
            // The acknowledgments are lost.
            peer writes 4000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            > . 2001:3001 ack 1
            > . 3001:4001 ack 1
            wait 10
            nothing
            wait 20
            > . 3001:4001 ack 1
            < . 1 ack 4001 win 512
            count TailProbe 1
            count TimeoutRetransmit 0
            // The last three segments are lost.
            peer writes 4000
            > . 4001:5001 ack 1
            > . 5001:6001 ack 1
            > . 6001:7001 ack 1
            > . 7001:8001 ack 1
            < . 1 ack 5001 win 512
            wait 30
            > . 7001:8001 ack 1
            < . 1 ack 5001 win 512
            > . 5001:6001 ack 1
            > . 6001:7001 ack 1
            > . 7001:8001 ack 1
            count FastRetransmit 1
            < . 1 ack 8001 win 512
            // A guest may delay the answer to two.
            peer writes 2000
            > . 8001:9001 ack 1
            > . 9001:10001 ack 1
            wait 200
            nothing
            < . 1 ack 10001 win 512
            // Nobody answers.
            peer writes 3000
            > . 10001:11001 ack 1
            > . 11001:12001 ack 1
            > . 12001:13001 ack 1
            wait 30
            > . 12001:13001 ack 1
            wait 380
            nothing
            wait 40
            > . 10001:11001 ack 1
            nothing
            count TailProbe 3
            count TimeoutRetransmit 1
            < . 1 ack 13001 win 512
            ",
        );
    });
}

/// T13: a frame that the port does not take counts as never sent, and it is sent when the port takes
/// it. No timer of a retransmission runs for it.
#[test]
fn a_refused_frame_is_sent_later() {
    for tells in [true, false] {
        each_way(|script| {
            script.net.out.tells = tells;
            script.open().run(
                "
                port space 1
                peer writes 3000
                > . 1:1001 ack 1
                nothing
                < . 1 ack 1001 win 512
                nothing
                port space 1
                > . 1001:2001 ack 1
                nothing
                port space 100
                > . 2001:3001 ack 1
                < . 1 ack 3001 win 512
                count TimeoutRetransmit 0
                port space 0
                peer writes 1000
                wait 5000
                nothing
                count TimeoutRetransmit 0
                ",
            );
            // Nobody says that there is space.
            script.net.out.space = 100;
            script.run(
                "
                wait 150
                > . 3001:4001 ack 1
                < . 1 ack 4001 win 512
                // Acknowledgments, FIN and resets too.
                port space 0
                < P. 1:101 ack 4001 win 512
                peer got 100
                nothing
                port space 1
                > . 4001 ack 101
                port space 0
                peer finishes
                nothing
                port space 1
                > F. 4001 ack 101
                port space 0
                peer resets
                nothing
                port space 1
                > R. 4002 ack 101
                empty
                ",
            );
        });
    }
}

/// Section 9, 5: a window is in units of 2 to the guest's shift.
#[test]
fn windows_are_scaled_and_kept() {
    each_way(|script| {
        script.open().run(
            "
            < . 1 ack 1 win 16
            peer writes 10000
            > . 1:1001 ack 1
            > . 1001:2001 ack 1
            // 48 bytes are left, which is not worth a segment.
            nothing
            < . 1 ack 2001 win 8
            > . 2001:3001 ack 1
            nothing
            // Of two windows, the one of the later segment counts.
            < P. 1:11 ack 3001 win 24
            > . 3001:4001 ack 11
            > . 4001:5001 ack 11
            > . 5001:6001 ack 11
            < . 1 ack 2001 win 512
            // An old segment is answered. Its window is not taken.
            > . 6001 ack 11
            nothing
            ",
        );
    });
}

/// Section 9, 8: what is less than a segment is sent at once.
#[test]
fn a_small_tail_is_sent_at_once() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 10
            > P. 1:11 ack 1
            peer writes 1100
            > . 11:1011 ack 1
            > P. 1011:1111 ack 1
            peer writes 1
            > P. 1111:1112 ack 1
            ",
        );
    });
}

/// Goal: bytes are discarded as soon as they are acknowledged, in one call for each batch, so that the
/// kernel's window grows. Nothing is discarded before.
#[test]
fn acknowledged_bytes_leave_the_kernel() {
    each_way(|script| {
        script.open().run("peer writes 3000");
        while script.next().is_some() {}
        script.run("< . 1 ack 501 win 512");
        let left = |script: &crate::support::script::Script| {
            script.net.kernel.with(0, |peer| peer.incoming.len())
        };
        let in_rings = left(script) == 0;
        assert!(in_rings || left(script) == 2500);
        let before = script.net.kernel.calls().discard;
        script.run("< . 1 ack 1001 win 512\n & . 1 ack 2001 win 512\n & . 1 ack 3001 win 512");
        assert_eq!(left(script), 0);
        assert_eq!(script.net.kernel.calls().discard - before, usize::from(!in_rings));
        // Where the kernel's offset is, is known. It is set once, and not again before a rewind.
        script.run("peer writes 3000\n < . 1 ack 4001 win 512\n peer writes 3000");
        assert_eq!(script.net.kernel.calls().set_peek_offset, usize::from(!in_rings));
    });
}

/// Goal: bytes stay in the kernel over the IP whose sockets can look at an offset, and only over that.
#[test]
fn each_ip_has_its_own_place_for_bytes() {
    for (of_v4, of_v6) in [(true, false), (false, true)] {
        for v6 in [false, true] {
            let mut script = Script::new(config(false), plain_link(), v6);
            let kernel = Kernel::new();
            {
                let capabilities = &mut kernel.0.borrow_mut().capabilities;
                (capabilities.peek_offset_v4, capabilities.peek_offset_v6) = (of_v4, of_v6);
            }
            script.net.nat = Nat::new(config(false), kernel.clone(), script.net.now);
            script.net.kernel = kernel;
            script.open().run("peer writes 500\n > . 1:501 ack 1");
            let (calls, in_kernel) = (script.net.kernel.calls(), if v6 { of_v6 } else { of_v4 });
            assert_eq!((calls.peek > 0, calls.receive > 0), (in_kernel, !in_kernel), "v6: {v6}");
        }
    }
}

/// Goal: an acknowledgment of what was never sent is answered and not believed.
#[test]
fn an_acknowledgment_of_the_future_is_not_believed() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 100
            > . 1:101 ack 1
            < . 1 ack 5000 win 512
            > . 101 ack 1
            count TcpSequence 1
            < . 1 ack 101 win 512
            peer writes 10
            > . 101:111 ack 1
            ",
        );
    });
}

/// Goal: reads that give less than was asked for, as they may, lose nothing.
#[test]
fn short_reads_lose_nothing() {
    each_way(|script| {
        script.open();
        script.net.kernel.0.borrow_mut().most = 300;
        // Every short read is followed by another event, as with epoll.
        for _ in 0..3 {
            script.run("peer writes 300");
        }
        script.run("> . 1:301 ack 1\n > . 301:601 ack 1\n > . 601:901 ack 1\n nothing");
    });
}

/// Goal: a flow with much to send lets others have their turn, and goes on by itself.
#[test]
fn a_flow_with_much_to_send_takes_turns() {
    each_way(|script| {
        script.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            peer connects
            > S. 0 ack 1
            < . 1 ack 1 win 8000
            ",
        );
        script.net.kernel.write(0, &stream(from_world, 0, 750_000));
        let (token, readiness) = script.net.kernel.take_event().unwrap();
        let (now, out) = (script.net.now, &mut script.net.out);
        script.net.nat.on_ready(token, readiness, now, out);
        let first = script.net.out.frames.len();
        assert!(first > 64 && first <= 4 * 64, "{first} frames in one turn");
        script.net.settle();
        // All of it, or what a ring holds.
        let unread = script.net.kernel.with(0, |peer| peer.incoming.len());
        let all = if unread == 750_000 { 750 } else { 262 };
        assert_eq!(script.net.out.frames.len(), all);
    });
}
