//! What a device remembers for another one.

use proptest::prelude::*;
use vmring_virtio::net::{NetDevice, NetError, NetSettings, QueueSetup};

use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{Guest, interface, poll_both};
use std::sync::Arc;
use std::task::Poll;

fn fresh(network: &str) -> NetDevice {
    let interrupts = Arc::new(crate::net::guest::Interrupts::default());
    NetDevice::new(interface(network), interrupts, NetSettings::default()).unwrap()
}

#[test]
fn a_guest_goes_on_at_another_device() {
    let [mut a, mut b] = pair("snapshot");
    b.fill(&one_buffer(2048), 16);
    b.poll();
    for number in 0..3 {
        a.send(&a.frame_to(b.mac(), 60, number));
    }
    poll_both(&mut a, &mut b);
    assert_eq!(b.received().len(), 3);
    b.send(&b.frame_to(a.mac(), 60, 9));
    b.poll();
    assert!(b.device.set_mtu(1400));
    assert!(b.device.pause().is_ready());
    let (snapshot, mac) = (b.device.snapshot(), b.mac());
    // The same guest, at a device on another interface.
    let mut device = fresh("snapshot");
    assert!(matches!(device.set_memory(&b.memory), Poll::Ready(Ok(()))));
    let queues = device.restore(&snapshot).unwrap();
    assert_eq!(queues.len(), 2);
    assert_eq!((queues[0].state.next_available, queues[1].state.next_used), (3, 1));
    for (queue, layout) in queues.iter().zip([b.rx.layout(), b.tx.layout()]) {
        let mut setup = QueueSetup::new(layout);
        (setup.state, setup.enabled) = (queue.state, queue.enabled);
        device.start_queue(queue.index, setup).unwrap();
    }
    assert_eq!((device.config().mac, device.config().mtu), (mac, 1400));
    assert!(matches!(device.restore(&snapshot), Err(NetError::Running { index: 0 })));
    // The old one has left the network when the new one announces the guest.
    let Guest { device: old, rx, tx, interrupts, memory } = b;
    drop(old);
    let mut b = Guest { device, rx, tx, interrupts, memory };
    b.poll();
    assert!(b.device.announce(mac));
    b.poll();
    let packet = a.frame_to(mac, 100, 4);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!(b.received(), [packet]);
}

#[test]
fn every_byte_of_a_snapshot_matters_and_none_panics() {
    let [_, mut b] = pair("changed snapshot");
    assert!(b.device.pause().is_ready());
    let snapshot = b.device.snapshot();
    let mut device = fresh("changed snapshot");
    for len in 0..snapshot.len() {
        let error = device.restore(&snapshot[..len]).unwrap_err();
        assert!(
            matches!(error, NetError::Snapshot("it is too short" | "it has too many queues")),
            "{len}: {error}"
        );
    }
    let longer = [&snapshot[..], &[0]].concat();
    assert!(matches!(device.restore(&longer), Err(NetError::Snapshot("it is too long"))));
    // In order: magic, version, features that are not offered, offloads that were not accepted, a group
    // address, an MTU that is too large, flags, pairs, active pairs, queues.
    let broken = [
        (0, 1),
        (4, 2),
        (8, 1),
        (16, 1),
        (24, 1),
        (31, 0xff),
        (32, 0x80),
        (33, 0),
        (33, 200),
        (35, 9),
        (37, 77),
        (39, 0xff),
        // The indices of the first queue, and whether it is enabled.
        (42, 0xff),
        (45, 2),
    ];
    for (at, value) in broken {
        let mut bytes = snapshot.clone();
        if bytes[at] == value {
            continue;
        }
        bytes[at] = if at == 24 { bytes[at] | 1 } else { value };
        let error = device.restore(&bytes).expect_err("it is refused");
        assert!(matches!(error, NetError::Snapshot(_)), "{at}: {error}");
    }
    assert_eq!(device.accepted_features().bits(), 0, "nothing has changed");
    assert!(device.restore(&snapshot).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(crate::support::scaled(500) as u32))]

    /// Any bytes are refused or restored, and what is restored can be written again.
    #[test]
    fn any_bytes_are_no_harm(
        changes in prop::collection::vec((0usize..80, any::<u8>()), 0..6),
        cut in 0usize..80,
    ) {
        thread_local! {
            static DEVICES: (std::cell::RefCell<NetDevice>, Vec<u8>) = {
                let device = fresh("random snapshot");
                let mut guest = Guest::new("random snapshot");
                assert!(guest.device.pause().is_ready());
                let snapshot = guest.device.snapshot();
                (device.into(), snapshot)
            };
        }
        DEVICES.with(|(device, snapshot)| {
            let mut bytes = snapshot.clone();
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            if cut < 20 {
                bytes.truncate(cut * 3);
            }
            let mut device = device.borrow_mut();
            if device.restore(&bytes).is_ok() {
                assert!(device.queue_states().is_empty());
                let _ = device.snapshot();
            }
        });
    }
}
