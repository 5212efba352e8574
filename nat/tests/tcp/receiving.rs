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
            > . 1 ack 1001 win 76
            < P. 1001:5001 ack 1 win 512
            > . 1 ack 5001 win 60
            < P. 5001:10241 ack 1 win 512
            > . 1 ack 10241 win 40
            // The window was offered while the buffer was empty. What is beyond it waits here.
            < P. 10241:20481 ack 1 win 512
            > . 1 ack 20481 win 0
            peer got 10240
            // The guest asks with a byte. Nobody has space for it.
            < . 20481:20482 ack 1 win 512
            > . 1 ack 20481 win 0
            peer got 10240
            wait 60000
            peer reads 100
            nothing
            peer reads 8000
            nothing
            // What waited here is gone, and the guest is told at once.
            peer reads 8000
            > . 1 ack 20481 win 62
            < P. 20481:21481 ack 1 win 512
            > . 1 ack 21481
            ",
        );
        // The keep-alives of a minute aside, the window was told by nothing else.
        assert_eq!(script.net.nat.counters()[vmring_nat::Counter::SpillFull], 0);
    }
}

/// Goal: a window that is closed opens by a segment or by a quarter of a small buffer, and not by less,
/// however often the guest asks: a guest that is offered a few bytes sends few bytes (RFC 9293, 3.8.6.2.2).
#[test]
fn no_window_is_offered_that_is_not_worth_a_segment() {
    for (capacity, less, more, window) in [(10_240, 1400, 100, 5), (2048, 510, 2, 2)] {
        for v6 in [false, true] {
            let mut script = small(false, capacity, v6);
            let full = 2 * capacity + 1;
            script.open().run(&format!(
                "
                < P. 1:{full} ack 1 win 512
                > . 1 ack {full} win 0
                peer reads {capacity}
                peer got {}
                // Less than a segment, and less than a quarter.
                peer reads {less}
                < . {} ack 1 win 512
                > . 1 ack {full} win 0
                < . {full}:{} ack 1 win 512
                > . 1 ack {full} win 0
                peer reads {more}
                < . {} ack 1 win 512
                > . 1 ack {full} win {window}
                ",
                full - 1,
                full - 1,
                full + 1,
                full - 1,
            ));
        }
    }
}

/// T5: FIN behind bytes for which there is no space is not taken, and the bytes in front of it are.
#[test]
fn fin_behind_the_window_is_not_taken() {
    let mut script = small(false, 2000, false);
    script.open().run(
        "
        < F. 1:4501 ack 1 win 512
        peer got 2000
        peer got no fin
        > . 1 ack 4001 win 0
        peer reads 2000
        nothing
        peer reads 2000
        > . 1 ack 4001
        < F. 4001:4501 ack 1 win 512
        peer got 4500
        peer got fin
        > . 1 ack 4502
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
        > S. 0 ack 1 win 65535 mss 16000
        < . 1 ack 1 win 512
        < P. 1:65481 ack 1 win 512
        & P. 65481:65536 ack 1 win 512
        > . 1 ack 65536 win 0
        peer got 46080
        peer reads 46080
        > . 1 ack 65536 win 284
        < P. 65536:131016 ack 1 win 512
        > . 1 ack 131016 win 28
        peer got 92160
        ",
    );
}

/// Goal: a guest that sends nothing while its window is less than a segment is told when there is space.
/// Method: its last batch leaves such a window, and does not fill the socket, so that the socket says of
/// itself nothing of the space.
#[test]
fn a_guest_that_waits_for_a_whole_segment_is_told() {
    for v6 in [false, true] {
        let link = vmring_nat::Link { mtu: 65_520, longest: 65_534, ..plain_link() };
        let mut script = Script::new(config(false), link, v6);
        {
            let mut world = script.net.kernel.0.borrow_mut();
            (world.capacity, world.understated) = (100_000, 70_000);
        }
        script.run(
            "
            < S 0 win 65535 mss 65460 ws 7
            peer connects
            > S. 0 ack 1 win 60000 mss 16000
            < . 1 ack 1 win 512
            < P. 1:32001 ack 1 win 512
            & P. 32001:45001 ack 1 win 512
            > . 1 ack 45001 win 58
            peer got 45000
            nothing
            peer reads 45000
            wait 100
            > . 1 ack 45001 win 234
            nothing
            ",
        );
    }
}

/// Goal: a buffer that the system makes larger only when somebody has filled it becomes larger, if the
/// peer takes what is in it and the guest sends all that it may. Nothing is lost meanwhile.
#[test]
fn a_guest_that_sends_all_it_may_makes_the_buffer_grow() {
    each_way(|script| {
        script.net.kernel.0.borrow_mut().grows = true;
        script.net.kernel.0.borrow_mut().capacity = 50_000;
        script.open();
        let (mut at, mut window) = (1, 50_000);
        for _ in 0..12 {
            // All of it comes in one batch, or what a batch holds.
            let end = at + (window / 1000).clamp(1, 60) * 1000;
            let mut batch = format!("< . {at}:{} ack 1 win 512", at + 1000);
            for from in (at + 1000..end).step_by(1000) {
                batch += &format!("\n& . {from}:{} ack 1 win 512", from + 1000);
            }
            script.run(&batch);
            at = end;
            // The peer takes everything, also what was kept while the socket was full.
            for _ in 0..3 {
                let queued = script.net.kernel.with(0, |peer| peer.queued);
                script.run(&format!("peer reads {queued}"));
            }
            while let Some(segment) = script.next() {
                assert_eq!(segment.ack, script.isn.wrapping_add(at as u32));
                window = usize::from(segment.window) << 8;
            }
        }
        script.run(&format!("peer got {}\n count SpillFull 0", at - 1));
        let capacity = script.net.kernel.with(0, |peer| peer.capacity);
        assert!(capacity >= 100_000, "the buffer still has {capacity} bytes");
        assert!(window > 100_000, "a window of {window}");
    });
}

/// Goal: no guest is offered more than its socket takes if there is no block for what is beyond that, and
/// a block that is given back makes it possible again.
#[test]
fn without_a_block_no_window_goes_beyond_the_buffer() {
    let mut script = small(false, 10_240, false);
    take_all_blocks(&mut script, 1000, 10_240);
    begin(&mut script, 41_000, 1000, 10_240);
    script.run("< P. 1:10241 ack 1 win 512\n > . 1 ack 10241 win 0\n count SpillFull 0");
    script.net.kernel.read(0, 10_240);
    script.net.settle();
    script.net.out.frames.clear();
    begin(&mut script, 41_001, 1000, 20_480);
}

/// The handshake of another flow of the guest, with the window that it is offered.
fn begin(script: &mut Script, port: u16, mss: u16, window: u16) {
    script.guest.set_port(port);
    script.run(&format!(
        "
        < S 0 win 65535 mss {mss} ws 7
        peer connects
        > S. 0 ack 1 win {window}
        < . 1 ack 1 win 512
        "
    ));
}

/// Opens flows that send a byte more than their sockets take, until the port has no block for another.
fn take_all_blocks(script: &mut Script, mss: u16, capacity: u32) {
    // A port has at most three quarters of the 64 blocks.
    for port in 0..48 {
        begin(script, 40_000 + port, mss, (2 * capacity).min(65_535) as u16);
        let end = capacity + 2;
        script.run(&format!("< P. 1:{end} ack 1 win 512\n > . 1 ack {end}"));
    }
}

/// T9: there is no deadlock either where no window goes beyond the buffer: it opens by a quarter of the buffer if
/// a segment is larger than all of it.
#[test]
fn without_a_block_a_small_buffer_does_not_deadlock() {
    let link = vmring_nat::Link { mtu: 65_520, longest: 65_534, ..plain_link() };
    let mut script = Script::new(config(false), link, false);
    script.net.kernel.0.borrow_mut().capacity = 46_080;
    take_all_blocks(&mut script, 65_480, 46_080);
    begin(&mut script, 41_000, 65_480, 46_080);
    script.run(
        "
        < P. 1:46081 ack 1 win 512
        > . 1 ack 46081 win 0
        peer reads 46080
        wait 20
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
