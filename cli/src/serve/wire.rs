//! A guest on a wire: the owner of its link, and how it has ended.

use std::sync::{Arc, OnceLock};

use vmring::{CloseReason, Status};

use super::connection::{Ended, Guest};
use super::links::Owner;
use super::wire_stats::{PORT, WIRE, errors};
use crate::bridge::forwarding::Bridge;
use crate::failure::Failure;

/// Is told of the end of a link, on the thread that stops what the link had.
pub(super) struct LinkOwner<T> {
    pub(super) guest: Arc<Guest>,
    /// How it has ended is put here.
    pub(super) ended: Arc<OnceLock<Ended>>,
    pub(super) how: Option<Ended>,
    /// What is dropped when all is over, or when the thread has panicked.
    pub(super) _ending: T,
}

impl<T: Send> Owner for LinkOwner<T> {
    fn ended(&mut self, bridge: &Bridge) {
        let closed = |end: usize| bridge.control(end).closed();
        // What is lost, and not counted by a ring, was on its way when the link ended.
        let on_the_way = |from: usize| {
            let ring = bridge.control(1 - from);
            bridge.lost(from).saturating_sub(errors(&ring) + ring.stats().exhausted)
        };
        let lost = [("rx_undelivered", PORT), ("tx_undelivered", WIRE)];
        self.guest.freeze(lost.map(|(name, from)| (name, on_the_way(from))));
        let within = |name| bridge.counter(WIRE, name) > 0;
        self.how = match (closed(WIRE), closed(PORT)) {
            (Some(CloseReason::Failed(Status::Os(libc::EPROTO))), _) => {
                Some(Ended::Failed("it has sent a length above the maximum".to_owned()))
            }
            (Some(CloseReason::Failed(Status::Os(libc::ECONNRESET))), _)
                if within("peers gone within a packet") =>
            {
                Some(Ended::LeftWithin)
            }
            (
                Some(CloseReason::Failed(Status::Os(
                    libc::ECONNRESET | libc::ECONNREFUSED | libc::EPIPE | libc::ENOTCONN,
                ))),
                _,
            ) => Some(Ended::Left),
            (Some(why @ (CloseReason::Failed(_) | CloseReason::DevicePanicked)), _) => {
                Some(Ended::Failed(format!("its socket: {why}")))
            }
            (_, Some(why @ (CloseReason::Failed(_) | CloseReason::DevicePanicked))) => {
                Some(Ended::Failed(format!("its port: {why}")))
            }
            _ => None,
        };
    }

    fn gone(mut self: Box<Self>, outcome: Result<(), Failure>) {
        let how = match (self.how.take(), outcome) {
            (Some(how), _) => how,
            (None, Err(failure)) => Ended::Failed(failure.to_string()),
            (None, Ok(())) => Ended::Stopped,
        };
        // It is set once.
        let _ = self.ended.set(how);
    }
}
