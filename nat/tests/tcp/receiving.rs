//! From the guest to the world: sequence, acknowledgments, and windows of ours.

use crate::support::port::{config, plain_link};
use crate::support::script::{Script, each_way};

/// Section 9, 7: a batch's data is sent in one call and acknowledged once, and not apart from data that
/// goes to the guest anyway.
#[test]
fn one_call_and_one_acknowledgment_for_a_batch() {
    each_way(|script| {
        script.open();
        let before = script.net.kernel.calls();
        script.run(
            "
            < P. 1:101 ack 1 win 512
            & P. 101:201 ack 1 win 512
            & P. 201:301 ack 1 win 512
            peer got 300
            > . 1 ack 301
            nothing
            ",
        );
        let after = script.net.kernel.calls();
        assert_eq!((after.send - before.send, after.arm_writable), (1, before.arm_writable));
        // The answer is there already.
        script.net.kernel.write(0, b"\x01\x06");
        script.run("> . 1:3 ack 301\n < P. 301:311 ack 3 win 512\n > . 3 ack 311");
    });
}

/// Goal: what is out of order within a batch is put in order; what is missing is asked for; what comes
/// twice or overlaps is taken once.
#[test]
fn order_is_made_within_a_batch() {
    each_way(|script| {
        script.open().run(
            "
            < P. 201:301 ack 1 win 512
            & P. 101:201 ack 1 win 512
            & P. 1:101 ack 1 win 512
            peer got 300
            > . 1 ack 301
            // One is missing.
            < P. 401:501 ack 1 win 512
            & P. 501:601 ack 1 win 512
            peer got 300
            > . 1 ack 301
            > . 1 ack 301
            nothing
            // Overlaps on both sides.
            < P. 251:401 ack 1 win 512
            & P. 1:451 ack 1 win 512
            & P. 401:601 ack 1 win 512
            peer got 600
            > . 1 ack 601
            < P. 1:601 ack 1 win 512
            > . 1 ack 601
            peer got 600
            ",
        );
    });
}

/// Goal: a guest whose segment is lost hears of it as often as it must, however few batches its segments
/// come in (RFC 5681, 4.2), and without a change of the window, which would make it no duplicate. A flood
/// of such segments gets few answers.
#[test]
fn a_gap_is_told_by_duplicates() {
    each_way(|script| {
        script.open().run(
            "
            < P. 101:201 ack 1 win 512
            > . 1 ack 1
            nothing
            // What is in front of the gap is new, and the rest is not.
            < P. 1:101 ack 1 win 512
            & P. 201:301 ack 1 win 512
            & P. 301:401 ack 1 win 512
            & P. 401:501 ack 1 win 512
            & P. 501:601 ack 1 win 512
            peer got 100
            > . 1 ack 101
            > . 1 ack 101
            > . 1 ack 101
            > . 1 ack 101
            nothing
            ",
        );
        let windows: Vec<_> = (0..2)
            .flat_map(|_| {
                script.run("< P. 301:401 ack 1 win 512\n & P. 401:501 ack 1 win 512");
                std::iter::from_fn(|| script.next()).map(|got| got.window).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(windows, [windows[0]; 4]);
        script.run("< P. 101:601 ack 1 win 512\n peer got 600\n > . 1 ack 601\n nothing");
    });
}

/// T12: a keep-alive of the guest, without or with an old byte, is answered.
#[test]
fn keep_alives_are_answered() {
    each_way(|script| {
        script.open().run(
            "
            < P. 1:11 ack 1 win 512
            > . 1 ack 11
            < . 10 ack 1 win 512
            > . 1 ack 11
            < . 10:11 ack 1 win 512
            > . 1 ack 11
            nothing
            peer got 10
            // Its window counts.
            < . 11 ack 1 win 0
            peer writes 100
            nothing
            < . 10 ack 1 win 512
            > . 1:101 ack 11
            nothing
            ",
        );
    });
}

fn small(rings_only: bool, capacity: usize, v6: bool) -> Script {
    let script = Script::new(config(rings_only), plain_link(), v6);
    script.net.kernel.0.borrow_mut().capacity = capacity;
    script
}

/// T3: what the kernel does not take is kept and acknowledged, and sent when the kernel takes it. The
/// numbers stay in step. What nobody can keep is not acknowledged.
#[test]
fn what_the_kernel_does_not_take_is_spilled() {
    for v6 in [false, true] {
        let mut script = small(false, 8000, v6);
        script.open();
        // Another process's memory pressure: the kernel takes less than it has said.
        script.net.kernel.with(0, |peer| peer.capacity = 1500);
        script.run(
            "
            < P. 1:1001 ack 1 win 512
            & P. 1001:2001 ack 1 win 512
            & P. 2001:3001 ack 1 win 512
            peer got 1500
            > . 1 ack 3001
            count Spilled 1500
            // More comes behind what is spilled.
            < P. 3001:4001 ack 1 win 512
            peer got 1500
            > . 1 ack 4001
            peer reads 1500
            peer got 3000
            peer reads 1500
            peer got 4000
            < F. 4001 ack 1 win 512
            peer got fin
            > . 1 ack 4002
            ",
        );
    }
}

/// Goal: FIN waits behind what is spilled.
#[test]
fn fin_waits_behind_what_is_spilled() {
    let mut script = small(false, 8000, false);
    script.open();
    script.net.kernel.with(0, |peer| peer.capacity = 600);
    script.run(
        "
        < P. 1:1001 ack 1 win 512
        & F. 1001 ack 1 win 512
        > . 1 ack 1002
        peer got 600
        peer got no fin
        peer reads 600
        peer got 1000
        peer got fin
        peer finishes
        > F. 1 ack 1002
        < . 1002 ack 2 win 512
        peer got close
        empty
        ",
    );
}

/// Goal: the window closes as the peer stops reading, opens again when it reads, and the guest is told
/// by itself.
#[test]
fn the_window_follows_the_kernels_buffer() {
    for rings_only in [false, true] {
        let mut script = small(rings_only, 10_240, false);
        script.open().run(
            "
            < P. 1:1001 ack 1 win 512
            > . 1 ack 1001 win 36
            < P. 1001:5001 ack 1 win 512
            > . 1 ack 5001 win 20
            < P. 5001:10241 ack 1 win 512
            > . 1 ack 10241 win 0
            peer got 10240
            // The guest asks with a byte. Nobody has space for it.
            < . 10241:10242 ack 1 win 512
            > . 1 ack 10241 win 0
            peer got 10240
            wait 60000
            peer reads 100
            nothing
            peer reads 8000
            > . 1 ack 10241 win 31
            < P. 10241:11241 ack 1 win 512
            > . 1 ack 11241
            ",
        );
        // The keep-alives of a minute aside, the window was told by nothing else.
        assert_eq!(script.net.nat.counters()[vmring_nat::Counter::SpillFull], 0);
    }
}

/// T5: FIN behind bytes for which there is no space is not taken, and the bytes in front of it are.
#[test]
fn fin_behind_the_window_is_not_taken() {
    let mut script = small(false, 2000, false);
    script.open().run(
        "
        < F. 1:2501 ack 1 win 512
        peer got 2000
        peer got no fin
        > . 1 ack 2001 win 0
        peer reads 2000
        > . 1 ack 2001
        < F. 2001:2501 ack 1 win 512
        peer got 2500
        peer got fin
        > . 1 ack 2502
        ",
    );
}

/// T9: a segment may be larger than the whole buffer of the kernel. The window must open all the same.
#[test]
fn a_large_segment_and_a_small_buffer_do_not_deadlock() {
    let link = vmring_nat::Link { mtu: 65_520, longest: 65_534, ..plain_link() };
    let mut script = Script::new(config(false), link, false);
    script.net.kernel.0.borrow_mut().capacity = 46_080;
    script.run(
        "
        < S 0 win 65535 mss 65480 ws 7
        peer connects
        > S. 0 ack 1 win 46080 mss 65480
        < . 1 ack 1 win 512
        < P. 1:46081 ack 1 win 512
        > . 1 ack 46081 win 0
        peer reads 46080
        > . 1 ack 46081 win 180
        < P. 46081:92161 ack 1 win 512
        > . 1 ack 92161 win 0
        peer got 92160
        ",
    );
}

/// T10: the guest does not wait for the peer: what the kernel has taken is acknowledged, and the window
/// grows with the kernel's buffer.
#[test]
fn the_guest_does_not_wait_for_the_peer() {
    each_way(|script| {
        script.open().run("< P. 1:1001 ack 1 win 512");
        assert_eq!(script.next().unwrap().ack, script.isn.wrapping_add(1001));
        script.net.kernel.with(0, |peer| peer.capacity = 4 << 20);
        let mut at = 1001;
        let mut window = 0;
        for _ in 0..160 {
            script.run(&format!("< P. {at}:{} ack 1 win 512", at + 1000));
            at += 1000;
            window = script.next().expect("an acknowledgment").window;
            script.net.out.frames.clear();
        }
        assert!(usize::from(window) << 8 > 2 << 20, "a window of {window}");
    });
}

/// Section 9, 4: after a reset, nothing more is delivered. 3a: a reset is remembered, and never taken
/// for the end of the stream.
#[test]
fn a_reset_of_the_peer_is_no_end_of_the_stream() {
    each_way(|script| {
        script.open().run(
            "
            peer writes 1000
            > . 1:1001 ack 1
            peer writes 500
            peer resets
            > . 1001:1501 ack 1
            > R. 1501 ack 1
            nothing
            count WorldReset 1
            peer got reset
            empty
            ",
        );
    });
    // The reset is found by reading.
    each_way(|script| {
        script.open();
        script.net.kernel.with(0, |peer| peer.error = Some(vmring_nat::SocketError::Reset));
        script.net.kernel.write_after_reset(0);
        script.run("> R. 1 ack 1\n nothing\n empty");
    });
    // And by writing.
    each_way(|script| {
        script.open();
        script.net.kernel.with(0, |peer| peer.error = Some(vmring_nat::SocketError::Reset));
        script.run("< P. 1:11 ack 1 win 512\n > R. 1 ack 1\n nothing\n empty");
    });
    // And by closing.
    each_way(|script| {
        script.open();
        script.net.kernel.with(0, |peer| peer.error = Some(vmring_nat::SocketError::Reset));
        script.run("< F. 1 ack 1 win 512\n > R. 1 ack 2\n nothing\n empty");
    });
}

/// Goal: what is far from the flow's sequence is refused, and the guest is told where the flow is.
#[test]
fn segments_of_elsewhere_are_refused() {
    each_way(|script| {
        script.open().run(
            "
            < P. 900000000:900000010 ack 1 win 512
            > . 1 ack 1
            < R 900000000
            < R 2000000000
            nothing
            peer is open
            peer got 0
            count TcpSequence 3
            ",
        );
    });
}
