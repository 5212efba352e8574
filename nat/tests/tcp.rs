//! TCP by scripts: one for each way in which a translator is known to go wrong.

mod support;

use support::script::each_way;

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
            empty
            ",
        );
    });
}
