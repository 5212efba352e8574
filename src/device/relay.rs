//! For wrappers around another device: [`Relay`], and what they delegate.

use std::collections::VecDeque;

use crate::device::context::{CompletedSlot, PollContext, Posted, Sink};
use crate::device::seam::{Progress, Queue};
use crate::device::slot::{PostedSlot, class_index};
use crate::error::Status;

/// A private pair of lists for a wrapper: it takes slots from the poller's [`PollContext`], posts those it
/// likes to the queue it wraps, and sees what that queue completes.
#[derive(Debug, Default)]
pub struct Relay {
    posted: Posted,
    done: VecDeque<CompletedSlot>,
    kept: [i64; 2],
}

impl Relay {
    /// Posts a slot to the inner queue.
    pub fn post(&mut self, slot: PostedSlot) {
        self.posted.list(slot.class).push_back(slot);
    }

    /// Slots posted and not taken by the inner queue: reads and writes.
    pub fn posted(&self) -> (usize, usize) {
        (self.posted.reads.len(), self.posted.writes.len())
    }

    /// Polls the inner queue with what is posted.
    pub fn poll(&mut self, queue: &mut dyn Queue) -> Result<Progress, Status> {
        let before = self.slots_here();
        let sink = Sink::Relay(&mut self.done);
        let mut cx = PollContext::new(0, &mut self.posted, None, sink, [u32::MAX; 2]);
        let result = queue.poll(&mut cx);
        self.account_kept(before);
        result
    }

    /// As [`poll`](Self::poll) with everything that `cx` offers; what the inner queue leaves posted
    /// is put back.
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

    /// Puts what the inner queue left posted back to the poller.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, cx: &mut PollContext<'_>) {
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            while let Some(slot) = list.pop_back() {
                cx.put_back(slot);
            }
        }
    }

    /// Asks the inner queue to close.
    pub fn close(&mut self, queue: &mut dyn Queue) -> bool {
        let before = self.slots_here();
        let mut cx =
            PollContext::new(0, &mut self.posted, None, Sink::Relay(&mut self.done), [0; 2]);
        let closed = queue.close(&mut cx);
        self.account_kept(before);
        closed
    }

    /// Slots that are posted or done, by class: what a call of the inner queue takes off this sum, it
    /// keeps.
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

    /// What the inner queue has completed, oldest first.
    pub fn next_done(&mut self) -> Option<CompletedSlot> {
        self.done.pop_front()
    }

    /// Slots the inner queue keeps: reads and writes.
    pub fn kept(&self) -> (usize, usize) {
        (self.kept[0].max(0) as usize, self.kept[1].max(0) as usize)
    }
}

#[cfg(any(feature = "pcap", feature = "fault"))]
/// For wrappers: passes everything but `queue` (and what is given in braces) on to `self.device`.
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

            fn capabilities(&self) -> $crate::device::seam::Capabilities {
                self.device.capabilities()
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
