//! Queues, from the types of `virtio-queue` and back.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vmring_rust_vmm::{QueueConversionError, QueueDescription, virtio_queue};
use vmring_virtio::net::QueueSetup;
use vmring_virtio::queue::{AddressSpace, Part, QueueLayout, QueueState};

fn example() -> virtio_queue::QueueState {
    virtio_queue::QueueState {
        max_size: 256,
        next_avail: 2,
        next_used: 65534,
        event_idx_enabled: true,
        size: 64,
        ready: true,
        desc_table: 0x1_0000,
        avail_ring: 0x2_0002,
        used_ring: 0x3_0004,
    }
}

/// Sizes, some of which are possible.
fn size() -> impl Strategy<Value = u16> {
    prop_oneof![3 => (0u32..16).prop_map(|bits| 1 << bits), 1 => any::<u16>()]
}

/// Addresses, most of which are aligned.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![4 => any::<u64>().prop_map(|address| address & !0xf), 1 => any::<u64>()]
}

prop_compose! {
    fn any_state()(
        sizes in prop_oneof![3 => size().prop_map(|size| (size, size)), 1 => (size(), size())],
        next_avail in any::<u16>(),
        ahead in prop_oneof![3 => 0u16..=64, 1 => any::<u16>()],
        addresses in [address(), address(), address()],
        event_idx_enabled in any::<bool>(),
        ready in any::<bool>(),
    ) -> virtio_queue::QueueState {
        let [desc_table, avail_ring, used_ring] = addresses;
        virtio_queue::QueueState {
            max_size: sizes.0,
            next_avail,
            next_used: next_avail.wrapping_sub(ahead),
            event_idx_enabled,
            size: sizes.1,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

proptest! {
    /// Goal: a queue that both crates accept comes back as it was; what one of them refuses does not
    /// convert.
    #[test]
    fn a_queue_comes_back_as_it_was(state in any_state()) {
        let theirs = Queue::try_from(state);
        let apart = state.next_avail.wrapping_sub(state.next_used) > state.size;
        match QueueDescription::try_from(state) {
            Ok(description) => {
                prop_assert!(!apart);
                let theirs = theirs.expect("virtio-queue accepts it, too");
                prop_assert_eq!(QueueDescription::try_from(&theirs), Ok(description));
                prop_assert_eq!(virtio_queue::QueueState::try_from(description), Ok(state));
                prop_assert_eq!(Queue::try_from(description), Ok(theirs));
                prop_assert_eq!(description.layout.size, u32::from(state.size));
                let setup = QueueSetup::try_from(description);
                match setup {
                    Ok(setup) => {
                        prop_assert!(state.ready && setup.enabled && setup.kick.is_none());
                        prop_assert_eq!((setup.layout, setup.state), (description.layout, description.state));
                    }
                    Err(error) => prop_assert!(error == QueueConversionError::NotReady && !state.ready),
                }
            }
            Err(_) => prop_assert!(apart || theirs.is_err(), "{:?}", state),
        }
    }

    /// Goal: the same from vmring's side.
    #[test]
    fn a_description_comes_back_as_it_was(state in any_state(), log in any::<Option<u64>>(), own in any::<bool>()) {
        let description = QueueDescription {
            layout: QueueLayout {
                size: state.size.into(),
                descriptors: state.desc_table,
                available: state.avail_ring,
                used: state.used_ring,
                addresses: if own { AddressSpace::Guest } else { AddressSpace::FrontEnd },
                used_log: log,
            },
            state: QueueState { next_available: state.next_avail, next_used: state.next_used },
            event_idx: state.event_idx_enabled,
            max_size: state.max_size,
            ready: state.ready,
        };
        match Queue::try_from(description) {
            Ok(queue) => prop_assert_eq!(QueueDescription::try_from(&queue), Ok(description)),
            Err(error) => {
                let lost = !own || log.is_some();
                prop_assert!(lost || QueueDescription::try_from(state) == Err(error));
            }
        }
    }
}

/// Goal: each reason has its name.
#[test]
fn what_does_not_convert_says_why() {
    let with = |change: &dyn Fn(&mut virtio_queue::QueueState)| {
        let mut state = example();
        change(&mut state);
        QueueDescription::try_from(state).and_then(QueueSetup::try_from).map(|_| ())
    };
    assert_eq!(with(&|_| {}), Ok(()));
    let size = |size, max_size| Err(QueueConversionError::Size { size, max_size });
    assert_eq!(with(&|state| state.size = 0), size(0, 256));
    assert_eq!(with(&|state| state.size = 48), size(48, 256));
    assert_eq!(with(&|state| state.size = 512), size(512, 256));
    assert_eq!(with(&|state| state.max_size = 100), size(64, 100));
    let misaligned = |part, address| Err(QueueConversionError::Misaligned { part, address });
    assert_eq!(with(&|state| state.desc_table = 8), misaligned(Part::Descriptors, 8));
    assert_eq!(with(&|state| state.avail_ring = 1), misaligned(Part::Available, 1));
    assert_eq!(with(&|state| state.used_ring = 2), misaligned(Part::Used, 2));
    let state = QueueState { next_available: 63, next_used: 65534 };
    let apart = Err(QueueConversionError::State { state, size: 64 });
    assert_eq!(with(&|state| state.next_avail = 63), apart);
    assert_eq!(with(&|state| state.next_avail = 62), Ok(()), "all entries are with the device");
    assert_eq!(with(&|state| state.ready = false), Err(QueueConversionError::NotReady));

    let mut description = QueueDescription::try_from(example()).unwrap();
    description.layout.used_log = Some(0);
    assert_eq!(Queue::try_from(description), Err(QueueConversionError::UsedLog));
    description.layout.addresses = AddressSpace::FrontEnd;
    assert_eq!(Queue::try_from(description), Err(QueueConversionError::FrontEndAddresses));
    // Its size is not cut to 16 bits.
    description.layout.size = 1 << 16;
    let size = QueueConversionError::Size { size: 1 << 16, max_size: 256 };
    assert_eq!(Queue::try_from(description), Err(size));
}

/// Goal: a queue that nobody has set up yet converts, too.
#[test]
fn a_new_queue_converts() {
    let mut queue = Queue::new(1024).unwrap();
    let description = QueueDescription::try_from(&queue).unwrap();
    assert_eq!(
        (description.layout.size, description.max_size, description.ready),
        (1024, 1024, false)
    );
    queue.set_size(8);
    queue.set_ready(true);
    let description = QueueDescription::try_from(&queue).unwrap();
    assert_eq!((description.layout.size, description.max_size, description.ready), (8, 1024, true));
    assert_eq!(Queue::try_from(description).unwrap(), queue);
}
