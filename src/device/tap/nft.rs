//! nf_tables over netlink: transactions.

use netlink_bindings::nftables::{Chained, Nfgenmsg};

use super::link::{Refusal, Socket};

/// Returns the header of messages for the IPv4 family.
pub(super) fn ip() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = libc::AF_INET as u8;
    header
}

/// Sends the messages that `fill` adds as one transaction. The kernel carries out all of them or
/// none.
///
/// # Panics
///
/// Panics if there are more than 16 messages, with the begin and the end of the batch.
pub(super) fn transact(
    socket: &mut Socket,
    fill: impl FnOnce(&mut Chained<'static>),
) -> Result<(), Refusal> {
    let mut subsystem = Nfgenmsg::new();
    subsystem.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let first = socket.sequences(16);
    let mut batch = Chained::new(first);
    batch.request().op_batch_begin_do(&subsystem);
    fill(&mut batch);
    batch.request().op_batch_end_do(&subsystem);
    let batch = batch.finalize();
    let count = netlink_bindings::traits::NetlinkChained::chain_len(&batch) as u32;
    assert!(count <= 16, "more messages than sequence numbers");
    // Answers arrive in order. Linux before 6.10 answers neither the begin nor the end of a batch,
    // so the last answer that is certain to arrive is that to the message before the end. The
    // kernel reports a failed commit as an error of the begin.
    let last = first.wrapping_add(count - 2);
    socket.exchange(batch.buf(), first, last, |_| ())
}
