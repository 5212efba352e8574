//! Parts for devices that wrap another device: [`Relay`], and a macro that delegates methods.

use std::collections::VecDeque;

use crate::device::context::{CompletedSlot, PollContext, Posted, Sink};
use crate::device::seam::{Progress, Queue};
use crate::device::slot::{PostedSlot, class_index};
use crate::error::Status;

/// Stands between a wrapper's queue and the queue that it wraps.
///
/// A wrapper is a device that contains another device. Its queue owns the inner device's queue and
/// a relay, and does this in each [`Queue::poll`]:
///
/// 1. It takes slots from the poller's [`PollContext`] and posts those that the inner queue is to
///    get with [`post`](Self::post).
/// 2. It polls the inner queue with [`poll`](Self::poll). (If it has no choice to make,
///    [`pass_through`](Self::pass_through) does steps 1 to 3.)
/// 3. It returns to the poller what the inner queue did not take, with
///    [`put_back`](Self::put_back).
/// 4. It takes what the inner queue has completed with [`next_done`](Self::next_done), and
///    completes it on the ring with [`PollContext::forward`].
#[derive(Debug, Default)]
pub struct Relay {
    posted: Posted,
    done: VecDeque<CompletedSlot>,
    kept: [i64; 2],
}

impl Relay {
    /// Posts a slot to the inner queue, behind those that are posted.
    pub fn post(&mut self, slot: PostedSlot) {
        self.posted.list(slot.class).push_back(slot);
    }

    /// Returns how many reads and writes are posted and not taken by the inner queue.
    pub fn posted(&self) -> (usize, usize) {
        (self.posted.reads.len(), self.posted.writes.len())
    }

    /// Polls the inner queue, which may take every slot that is posted.
    ///
    /// # Errors
    ///
    /// The inner queue's own: its device has failed for good.
    pub fn poll(&mut self, queue: &mut dyn Queue) -> Result<Progress, Status> {
        let before = self.slots_here();
        let sink = Sink::Relay(&mut self.done);
        let mut cx = PollContext::new(0, &mut self.posted, None, sink, [u32::MAX; 2]);
        let result = queue.poll(&mut cx);
        self.account_kept(before);
        result
    }

    /// Posts every slot that `cx` offers, polls the inner queue, and puts back what it did not
    /// take.
    ///
    /// # Errors
    ///
    /// The inner queue's own: its device has failed for good.
    pub fn pass_through(
        &mut self,
        queue: &mut dyn Queue,
        cx: &mut PollContext<'_>,
    ) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_read() {
            self.post(slot);
        }
        while let Some(slot) = cx.take_write() {
            self.post(slot);
        }
        let result = self.poll(queue);
        self.put_back(cx);
        result
    }

    /// Puts the slots that the inner queue did not take back to the poller, in their order.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, cx: &mut PollContext<'_>) {
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            while let Some(slot) = list.pop_back() {
                cx.put_back(slot);
            }
        }
    }

    /// Calls the inner queue's [`close`](Queue::close). Returns whether it keeps no slot any more.
    ///
    /// Afterwards, complete what [`next_done`](Self::next_done) returns: a queue gives back what it
    /// keeps when it closes.
    pub fn close(&mut self, queue: &mut dyn Queue) -> bool {
        let before = self.slots_here();
        let mut cx =
            PollContext::new(0, &mut self.posted, None, Sink::Relay(&mut self.done), [0; 2]);
        let closed = queue.close(&mut cx);
        self.account_kept(before);
        closed
    }

    /// The numbers of reads and writes that are in this relay: posted, or done. If a call of the
    /// inner queue makes a number smaller, the queue keeps the difference.
    fn slots_here(&self) -> [i64; 2] {
        let (reads, writes) = self.posted();
        let mut sum = [reads as i64, writes as i64];
        for done in &self.done {
            sum[class_index(done.slot.class)] += 1;
        }
        sum
    }

    fn account_kept(&mut self, before: [i64; 2]) {
        let now = self.slots_here();
        self.kept[0] += before[0] - now[0];
        self.kept[1] += before[1] - now[1];
    }

    /// Returns the next slot that the inner queue has completed, in the order of completion.
    pub fn next_done(&mut self) -> Option<CompletedSlot> {
        self.done.pop_front()
    }

    /// Returns how many reads and writes the inner queue keeps.
    pub fn kept(&self) -> (usize, usize) {
        (self.kept[0].max(0) as usize, self.kept[1].max(0) as usize)
    }
}

#[cfg(any(feature = "pcap", feature = "fault"))]
/// Implements [`Device`](crate::device::Device) for a wrapper: the methods in braces, which must
/// include `queue`, are its own. All others call `self.device`.
macro_rules! delegate_device {
    ($device:ty { $($own:item)* }) => {
        impl $crate::device::seam::Device for $device {
            $($own)*

            fn name(&self) -> &str {
                self.device.name()
            }

            fn info(&self) -> $crate::config::InterfaceInfo {
                self.device.info()
            }

            /// A wrapper looks at the bytes of packets, so it takes frames only.
            fn capabilities(&self) -> $crate::device::seam::Capabilities {
                $crate::device::seam::Capabilities {
                    read_segments: 0,
                    write_segments: 0,
                    merges_reads: false,
                    ..self.device.capabilities()
                }
            }

            fn stop(&self) -> Result<(), $crate::Error> {
                self.device.stop()
            }

            fn restart(&self) -> Result<(), $crate::Error> {
                self.device.restart()
            }

            fn add_port_forward(&self, rule: &$crate::config::PortForward) -> Result<(), $crate::Error> {
                self.device.add_port_forward(rule)
            }

            fn remove_port_forward(&self, protocol: $crate::config::Protocol, port: u16) -> Result<(), $crate::Error> {
                self.device.remove_port_forward(protocol, port)
            }

            fn port_forwards(&self) -> Result<Vec<$crate::config::PortForward>, $crate::Error> {
                self.device.port_forwards()
            }

            fn shared_interfaces(&self) -> Result<Vec<String>, $crate::Error> {
                self.device.shared_interfaces()
            }

            fn system_name(&self) -> Option<String> {
                self.device.system_name()
            }

            fn lease(&self, mac: $crate::MacAddr6) -> Option<$crate::device::seam::Lease> {
                self.device.lease(mac)
            }

            fn counters(&self) -> Vec<(&'static str, u64)> {
                self.device.counters()
            }

            fn drops(&self) -> Vec<(&'static str, u64)> {
                self.device.drops()
            }
        }
    };
}
#[cfg(any(feature = "pcap", feature = "fault"))]
pub(crate) use delegate_device;
