//! The orders of messages of the front ends that people use. What each sends is from its source or
//! was seen on its socket; names and numbers are those of the document.

use std::io::pipe;

use crate::frontend::*;
use crate::harness::*;

use vmring_virtio::vhost_user::features::PROTOCOL_FEATURES;

const MQ: u64 = 1 << 0;
const LOG_SHMFD: u64 = 1 << 1;
const RARP: u64 = 1 << 2;
const REPLY_ACK: u64 = 1 << 3;
const MTU: u64 = 1 << 4;
const BACKEND_REQ: u64 = 1 << 5;
const CONFIG: u64 = 1 << 9;
const RESET_DEVICE: u64 = 1 << 13;
const MEM_SLOTS: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const DEVICE_STATE: u64 = 1 << 19;

/// A front end: the protocol features that it acknowledges, whether it asks for a reply each time,
/// and what it sends.
struct Order {
    name: &'static str,
    protocol: u64,
    needs_replies: bool,
    script: fn(&Events, &Events) -> Vec<Sent>,
}

fn channel(request: u32) -> Sent {
    let (ours, _) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    Sent::new(request, []).with(ours)
}

fn ask(request: u32) -> Sent {
    Sent::new(request, [])
}

fn table() -> Sent {
    Sent::table(&[region()]).with(memory(SIZE))
}

fn num(index: u32) -> Sent {
    Sent::state(SET_VRING_NUM, index, 256)
}

fn base(index: u32) -> Sent {
    Sent::state(SET_VRING_BASE, index, 7)
}

fn addr(index: u32) -> Sent {
    Sent::addresses(index, 0, ring_at(index))
}

fn enable(index: u32) -> Sent {
    Sent::state(SET_VRING_ENABLE, index, 1)
}

/// QEMU 7.2, `hw/virtio/vhost-user.c`. Many SET_VRING_ENABLE come before there is a ring.
fn qemu(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(
            SET_PROTOCOL_FEATURES,
            MQ | LOG_SHMFD | RARP | REPLY_ACK | MTU | BACKEND_REQ | MEM_SLOTS | STATUS,
        ),
        ask(GET_QUEUE_NUM),
        ask(GET_MAX_MEM_SLOTS),
        channel(SET_BACKEND_REQ_FD).need_reply(),
        ask(SET_OWNER),
        ask(GET_FEATURES),
        rx.set_call(0),
        rx.set_err(0),
        tx.set_call(1),
        tx.set_err(1),
    ];
    script.extend((0..3).flat_map(|_| [enable(0), enable(1)]));
    script.extend([
        Sent::number(SET_FEATURES, FEATURES),
        ask(GET_STATUS),
        Sent::number(SET_STATUS, 11),
        Sent::number(NET_SET_MTU, 1500).need_reply(),
        Sent::region(ADD_MEM_REG, region()).with(memory(SIZE)).need_reply(),
    ]);
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([
            num(index),
            base(index),
            addr(index),
            events.set_kick(index.into()),
            events.set_call(index.into()),
        ]);
    }
    script.extend([ask(GET_STATUS), Sent::number(SET_STATUS, 15)]);
    script
}

/// cloud-hypervisor, `virtio-devices/src/vhost_user/vu_common_ctrl.rs`: sizes of all rings first,
/// and a reply to everything.
fn cloud_hypervisor(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(SET_OWNER),
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(
            SET_PROTOCOL_FEATURES,
            MQ | CONFIG | REPLY_ACK | MEM_SLOTS | LOG_SHMFD | DEVICE_STATE,
        ),
        ask(GET_QUEUE_NUM),
        // Its `VirtioNetConfig` has more fields than we know.
        Sent::config(GET_CONFIG, 0, 1, &[0; 24]),
        Sent::number(SET_FEATURES, FEATURES),
        table(),
        num(0),
        num(1),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([
            addr(index),
            base(index),
            events.set_call(index.into()),
            events.set_kick(index.into()),
        ]);
    }
    script.extend([enable(0), enable(1)]);
    script
}

/// crosvm, `devices/src/virtio/vhost_user_frontend`: the protocol features before the features, the
/// configuration at every read of the guest.
fn crosvm(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(SET_OWNER),
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(SET_PROTOCOL_FEATURES, CONFIG | MQ | BACKEND_REQ | DEVICE_STATE | REPLY_ACK),
        ask(GET_QUEUE_NUM),
        Sent::number(SET_FEATURES, FEATURES),
        channel(SET_BACKEND_REQ_FD),
        Sent::config(GET_CONFIG, 0, 1, &[0; 6]),
        Sent::config(GET_CONFIG, 8, 1, &[0; 2]),
        table(),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([
            num(index),
            addr(index),
            base(index),
            events.set_call(index.into()),
            events.set_kick(index.into()),
            enable(index),
        ]);
    }
    script
}

/// user-mode Linux, `arch/um/drivers/virtio_uml.c`: call first, a region far inside its file.
fn user_mode_linux(rx: &Events, tx: &Events) -> Vec<Sent> {
    let offset = 0x5c_e300;
    let region = Region { mmap_offset: offset, ..region() };
    let mut script = vec![
        ask(SET_OWNER),
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(SET_PROTOCOL_FEATURES, REPLY_ACK | BACKEND_REQ | CONFIG),
        channel(SET_BACKEND_REQ_FD).need_reply(),
        Sent::number(SET_FEATURES, FEATURES),
        // It sends space for a second region.
        Sent::table(&[region]).and([0; 32]).with(memory(offset + SIZE)).need_reply(),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([events.set_call(index.into()), num(index), base(index), addr(index)]);
    }
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([events.set_kick(index.into()), enable(index)]);
    }
    script
}

/// libkrun, `src/devices/src/virtio/vhost_user/device.rs`: memory before features, base before
/// addresses, kick before call, one call event for all rings.
fn libkrun(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(SET_PROTOCOL_FEATURES, CONFIG | MQ),
        ask(GET_QUEUE_NUM),
        Sent::config(GET_CONFIG, 0, 0, &[0; 12]),
        ask(SET_OWNER),
        table(),
        Sent::number(SET_FEATURES, FEATURES),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([
            num(index),
            base(index),
            addr(index),
            events.set_kick(index.into()),
            rx.set_call(index.into()),
            enable(index),
        ]);
    }
    script
}

/// DPDK's virtio-user, `drivers/net/virtio/virtio_user`: the calls before the features, and at run
/// time a new table between a disabling and an enabling.
fn virtio_user(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(SET_OWNER),
        ask(GET_FEATURES),
        ask(GET_PROTOCOL_FEATURES),
        Sent::number(SET_PROTOCOL_FEATURES, MQ | REPLY_ACK | STATUS),
        Sent::number(SET_STATUS, 0),
        Sent::number(SET_STATUS, 3),
        rx.set_call(0),
        tx.set_call(1),
        Sent::number(SET_FEATURES, FEATURES),
        table(),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([num(index), base(index), addr(index), events.set_kick(index.into())]);
    }
    script.extend([enable(0), enable(1), ask(GET_STATUS), Sent::number(SET_STATUS, 15)]);
    script.extend([
        Sent::state(SET_VRING_ENABLE, 0, 0),
        Sent::state(SET_VRING_ENABLE, 1, 0),
        table(),
        enable(0),
        enable(1),
    ]);
    script
}

/// A front end that knows no protocol features. Its rings are enabled from the start.
fn without_protocol_features(rx: &Events, tx: &Events) -> Vec<Sent> {
    let mut script = vec![
        ask(GET_FEATURES),
        ask(SET_OWNER),
        Sent::number(SET_FEATURES, FEATURES & !PROTOCOL_FEATURES),
        table(),
    ];
    for (index, events) in [(0, rx), (1, tx)] {
        script.extend([
            num(index),
            base(index),
            addr(index),
            events.set_kick(index.into()),
            events.set_call(index.into()),
        ]);
    }
    script
}

const ORDERS: &[Order] = &[
    Order {
        name: "QEMU 7.2",
        protocol: MQ | LOG_SHMFD | RARP | REPLY_ACK | MTU | BACKEND_REQ | MEM_SLOTS | STATUS,
        needs_replies: false,
        script: qemu,
    },
    Order {
        name: "cloud-hypervisor",
        protocol: MQ | CONFIG | REPLY_ACK | MEM_SLOTS | LOG_SHMFD | DEVICE_STATE,
        needs_replies: true,
        script: cloud_hypervisor,
    },
    Order {
        name: "crosvm",
        protocol: CONFIG | MQ | BACKEND_REQ | DEVICE_STATE | REPLY_ACK,
        needs_replies: false,
        script: crosvm,
    },
    Order {
        name: "user-mode Linux",
        protocol: REPLY_ACK | BACKEND_REQ | CONFIG,
        needs_replies: false,
        script: user_mode_linux,
    },
    Order { name: "libkrun", protocol: CONFIG | MQ, needs_replies: false, script: libkrun },
    Order {
        name: "DPDK virtio-user",
        protocol: MQ | REPLY_ACK | STATUS,
        needs_replies: false,
        script: virtio_user,
    },
    Order {
        name: "without protocol features",
        protocol: 0,
        needs_replies: false,
        script: without_protocol_features,
    },
];

/// Whether the document wants a reply to this request.
fn has_reply(request: u32) -> bool {
    matches!(
        request,
        GET_FEATURES
            | GET_PROTOCOL_FEATURES
            | GET_VRING_BASE
            | SET_LOG_BASE
            | GET_QUEUE_NUM
            | GET_CONFIG
            | GET_MAX_MEM_SLOTS
            | GET_STATUS
            | SET_DEVICE_STATE_FD
            | CHECK_DEVICE_STATE
    )
}

/// Goal: with each front end's order, rings 0 and 1 run, with what it has set, and replies come where
/// the protocol wants them. Then they stop as it stops them.
#[test]
fn each_front_ends_order_starts_its_rings() {
    for order in ORDERS {
        let mut harness = Harness::new();
        let (rx, tx) = (Events::new(), Events::new());
        let mut acknowledged = 0;
        for mut message in (order.script)(&rx, &tx) {
            if order.needs_replies && acknowledged & REPLY_ACK != 0 {
                message = message.need_reply();
            }
            if message.request == SET_PROTOCOL_FEATURES {
                acknowledged = order.protocol;
            }
            let wants = message.flags & NEED_REPLY != 0 && acknowledged & REPLY_ACK != 0;
            if has_reply(message.request) {
                harness.ask(message);
            } else if wants {
                let reply = harness.number(message);
                assert_eq!(reply, 0, "{}", order.name);
            } else {
                harness.tell(message);
            }
        }
        let device = harness.session.backend();
        assert_eq!(device.rings.len(), 2, "{}", order.name);
        for (index, ring) in &device.rings {
            let at = u64::from(*index) * 0x1_0000 + GUEST;
            assert_eq!((ring.size, ring.base, ring.enabled), (256, 7, true), "{}", order.name);
            assert_eq!(
                (ring.descriptors, ring.available, ring.used),
                (at, at + 0x1000, at + 0x2000),
                "{}",
                order.name
            );
            assert!(ring.kick.is_some() && ring.call.is_some(), "{}", order.name);
            assert_eq!(ring.features, FEATURES & !PROTOCOL_FEATURES, "{}", order.name);
        }
        for index in 0..2 {
            let reply = harness.ask(Sent::state(GET_VRING_BASE, index, 0));
            assert_eq!(reply.payload, u32s(&[index, 7]), "{}", order.name);
        }
        assert!(harness.session.backend().rings.is_empty(), "{}", order.name);
        assert_eq!(harness.session.stats().refused, 0, "{}", order.name);
        harness.end();
        assert!(matches!(rx.copies(), None | Some(0)), "{}", order.name);
    }
}

/// Goal: what is offered is exactly what the module says, and CONFIG only if it is switched on.
#[test]
fn what_is_offered_depends_on_the_switch_for_config_only() {
    let all = MQ | LOG_SHMFD | RARP | REPLY_ACK | MTU | BACKEND_REQ;
    let all = all | RESET_DEVICE | MEM_SLOTS | STATUS | DEVICE_STATE;
    for config in [false, true] {
        let mut settings = settings();
        settings.config = config;
        let mut harness = Harness::with(settings, Device::default());
        let wanted = if config { all | CONFIG } else { all };
        assert_eq!(harness.number(ask(GET_PROTOCOL_FEATURES)), wanted);
        // The control queue of the device is not offered: front ends serve it themselves.
        assert_eq!(harness.number(ask(GET_FEATURES)), LOGGED);
        harness.tell(Sent::number(SET_PROTOCOL_FEATURES, wanted));
        assert_eq!(harness.number(ask(GET_QUEUE_NUM)), 4, "two for each pair");
        assert_eq!(harness.number(ask(GET_MAX_MEM_SLOTS)), 509);
        harness.end();
    }
}

/// Goal: user-mode Linux probes its driver again without GET_VRING_BASE. The rings stop by
/// themselves, and start again.
#[test]
fn a_front_end_that_sets_a_running_ring_up_again_restarts_it() {
    let mut harness = Harness::running();
    for index in [1, 0] {
        harness.tell(Sent::state(SET_VRING_ENABLE, index, 0));
    }
    harness.tell(Sent::number(SET_FEATURES, FEATURES));
    harness.tell(Sent::table(&[region()]).with(&harness.memory));
    assert_eq!(harness.session.backend().rings.len(), 2, "the same memory again");
    harness.tell(num(0));
    assert_eq!(harness.session.backend().rings.len(), 1, "ring 0 waits for its kick");
    harness.tell(base(0));
    harness.tell(addr(0));
    let events = Events::new();
    harness.tell(events.set_kick(0));
    assert_eq!(harness.session.backend().rings[&0].base, 7);
    harness.end();
}

/// Goal: a descriptor that no ring has (bit 8) means polling, in both directions.
#[test]
fn a_ring_without_descriptors_is_polled() {
    let mut harness = Harness::negotiated();
    harness.tell(num(0));
    harness.tell(addr(0));
    harness.tell(Sent::number(SET_VRING_CALL, NO_DESCRIPTOR));
    harness.tell(Sent::number(SET_VRING_ERR, NO_DESCRIPTOR));
    assert!(harness.session.backend().rings.is_empty());
    harness.tell(Sent::number(SET_VRING_KICK, NO_DESCRIPTOR));
    let ring = &harness.session.backend().rings[&0];
    assert!(ring.kick.is_none() && ring.call.is_none());
    assert!(!ring.enabled, "with protocol features, a ring begins disabled");
    let (call, call_end) = pipe().expect("a pipe");
    harness.tell(Sent::number(SET_VRING_CALL, 0).with(call_end));
    assert_eq!(signalled(&call), 8, "a new event is signalled once");
    harness.end();
}
