//! What an interrupt may do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use vmring_virtio::net::{
    Features, Interrupt, NetDevice, NetSettings, Notifier, QueueSetup, StatsHandle,
};

use crate::net::basics::one_buffer;
use crate::net::guest::{Guest, driver, interface, layout, memory};
use crate::support::guarded;

/// The handles of a device, as a VMM has them elsewhere.
#[derive(Default)]
struct Curious {
    handles: OnceLock<(Notifier, StatsHandle)>,
    calls: AtomicU64,
}

impl Interrupt for Curious {
    fn queue(&self, index: u16) {
        let (notifier, stats) = self.handles.get().expect("the device was made");
        notifier.notify(index);
        assert!(stats.stats().interrupts > 0);
        self.calls.fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {
        self.queue(0);
    }
}

/// Goal: the device holds no lock while it interrupts, so that a VMM whose interrupt is an exit of the
/// processor may notify the device, and read its counters, from there.
#[test]
fn an_interrupt_may_use_every_handle_of_its_device() {
    guarded("an interrupt that calls back", || {
        let interrupt = Arc::new(Curious::default());
        let settings = NetSettings::default();
        let device = NetDevice::new(interface("callbacks"), interrupt.clone(), settings);
        let mut device = device.expect("a device");
        let handles = (device.notifier(), device.stats_handle());
        assert!(interrupt.handles.set(handles).is_ok());
        let accepted = device.features().without(Features::EVENT_IDX);
        device.set_features(accepted).expect("they were offered");
        let memory = memory(None);
        assert!(matches!(device.set_memory(&memory), Poll::Ready(Ok(()))));
        let mut rx = driver(&memory, 0, 256, accepted, 0);
        device.start_queue(0, QueueSetup::new(layout(0, 256))).expect("the queue starts");
        rx.post(&one_buffer(2048).buffers, None).expect("there is space");
        rx.expose();
        let mut other = Guest::new("callbacks");
        let _ = device.poll();
        other.send(&other.frame_to(device.config().mac, 60, 1));
        other.poll();
        let mut polls = 0;
        while device.poll().again {
            polls += 1;
            assert!(polls < 1000, "its own interrupts keep it awake");
        }
        assert_eq!((interrupt.calls.load(Ordering::SeqCst), rx.collect().len()), (1, 1));
        device.set_link(false);
        assert_eq!(interrupt.calls.load(Ordering::SeqCst), 2);
    });
}
