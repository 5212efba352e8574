//! Random messages: no panic, no descriptor or mapping that stays, and replies only where the
//! protocol wants them.

use std::fs::File;
use std::os::fd::AsFd;
use std::task::Poll;

use proptest::prelude::*;
use vmring_virtio::vhost_user::Progress;

use crate::frontend::*;
use crate::harness::*;

/// What goes with a message.
#[derive(Clone, Copy, Debug)]
enum Attached {
    Memory,
    Short,
    Kick,
    Call,
    Folder,
}

#[derive(Clone, Debug)]
struct Step {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    attached: Vec<Attached>,
    /// How often the device is not ready to stop.
    drains: u32,
}

fn attached() -> impl Strategy<Value = Attached> {
    prop_oneof![
        6 => Just(Attached::Memory),
        1 => Just(Attached::Short),
        2 => Just(Attached::Kick),
        2 => Just(Attached::Call),
        1 => Just(Attached::Folder),
    ]
}

fn regions() -> impl Strategy<Value = Region> {
    let page = prop_oneof![4 => 0u64..4, 1 => any::<u64>()];
    (page.clone(), page.clone(), 0u64..3, page).prop_map(|(guest, user, size, offset)| Region {
        guest_address: guest.wrapping_mul(0x1_0000),
        size: size * 0x1_0000,
        user_address: USER.wrapping_add(user.wrapping_mul(0x1_0000)),
        mmap_offset: offset.wrapping_mul(0x1000),
    })
}

/// Messages that are mostly right, so that a session gets far.
fn likely() -> impl Strategy<Value = Step> {
    let ring = 0u32..5;
    let sent = prop_oneof![
        Just(()).prop_map(|()| known(Sent::new(GET_FEATURES, []))),
        Just(()).prop_map(|()| known(Sent::new(GET_PROTOCOL_FEATURES, []))),
        prop::sample::select(vec![FEATURES, LOGGED, FEATURES & !(1 << 30), 0, 1 << 15])
            .prop_map(|bits| known(Sent::number(SET_FEATURES, bits))),
        prop_oneof![Just(all_but(&[])), Just(0), any::<u64>().prop_map(|bits| bits & all_but(&[]))]
            .prop_map(|bits| known(Sent::number(SET_PROTOCOL_FEATURES, bits))),
        prop::collection::vec(regions(), 1..4).prop_map(|regions| {
            let count = regions.len();
            (Sent::table(&regions), vec![Attached::Memory; count])
        }),
        regions().prop_map(|region| (Sent::region(ADD_MEM_REG, region), vec![Attached::Memory])),
        regions().prop_map(|region| known(Sent::region(REM_MEM_REG, region))),
        (ring.clone(), 0u32..4).prop_map(|(ring, size)| known(Sent::state(
            SET_VRING_NUM,
            ring,
            1 << (size * 5)
        ))),
        (ring.clone(), any::<u16>()).prop_map(|(ring, base)| known(Sent::state(
            SET_VRING_BASE,
            ring,
            base.into()
        ))),
        ring.clone().prop_map(|ring| known(Sent::state(GET_VRING_BASE, ring, 0))),
        (ring.clone(), 0u32..2, 0u64..4).prop_map(|(ring, flags, page)| {
            let at = USER + page * 0x1_0000;
            known(Sent::addresses(ring, flags, [at, at + 0x2000, at + 0x1000, page * 0x1000]))
        }),
        ring.clone()
            .prop_map(|ring| (Sent::number(SET_VRING_KICK, ring.into()), vec![Attached::Kick])),
        ring.clone()
            .prop_map(|ring| (Sent::number(SET_VRING_CALL, ring.into()), vec![Attached::Call])),
        ring.clone()
            .prop_map(|ring| known(Sent::number(SET_VRING_KICK, NO_DESCRIPTOR | u64::from(ring)))),
        (ring, 0u32..2).prop_map(|(ring, on)| known(Sent::state(SET_VRING_ENABLE, ring, on))),
        (0u64..5, 0u64..3).prop_map(|(size, offset)| {
            let log = Sent::new(SET_LOG_BASE, u64s(&[size * 13, offset]));
            (log, vec![Attached::Memory])
        }),
        (0u32..2).prop_map(|to| (Sent::state(SET_DEVICE_STATE_FD, to, 0), vec![Attached::Memory])),
        Just(()).prop_map(|()| known(Sent::new(CHECK_DEVICE_STATE, []))),
        Just(()).prop_map(|()| known(Sent::new(RESET_DEVICE, []))),
        (0u64..16).prop_map(|status| known(Sent::number(SET_STATUS, status))),
        (0u64..10_000).prop_map(|mtu| known(Sent::number(NET_SET_MTU, mtu))),
        (0u32..300, 0usize..250).prop_map(|(at, len)| known(Sent::config(
            GET_CONFIG,
            at,
            0,
            &vec![0; len]
        ))),
    ];
    (sent, any::<bool>(), 0u32..3).prop_map(|((sent, attached), need_reply, drains)| Step {
        request: sent.request,
        flags: if need_reply { VERSION | NEED_REPLY } else { VERSION },
        payload: sent.payload,
        attached,
        drains,
    })
}

fn known(sent: Sent) -> (Sent, Vec<Attached>) {
    (sent, Vec::new())
}

/// Messages of any form.
fn wild() -> impl Strategy<Value = Step> {
    (
        0u32..48,
        prop_oneof![9 => Just(VERSION), 1 => any::<u32>()],
        prop::collection::vec(any::<u8>(), 0..300),
        prop::collection::vec(attached(), 0..12),
    )
        .prop_map(|(request, flags, payload, attached)| Step {
            request,
            flags,
            payload,
            attached,
            drains: 0,
        })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(prop_oneof![40 => likely(), 1 => wild()], 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn random_messages_do_no_harm(steps in steps(), negotiated: bool) {
        let mut harness = if negotiated { Harness::running() } else { Harness::new() };
        let short = memory(10);
        let folder = File::open(std::env::temp_dir()).expect("a folder");
        let events = Events::new();
        let kick = events.set_kick(0).fds.remove(0);
        let call = events.set_call(0).fds.remove(0);
        'messages: for step in steps {
            let mut sent = Sent::new(step.request, step.payload);
            sent.flags = step.flags;
            for attached in step.attached {
                sent = match attached {
                    Attached::Memory => sent.with(&harness.memory),
                    Attached::Short => sent.with(&short),
                    Attached::Kick => sent.with(&kick),
                    Attached::Call => sent.with(&call),
                    Attached::Folder => sent.with(&folder),
                };
            }
            harness.session.backend_mut().drains = step.drains;
            let fds: Vec<_> = sent.fds.iter().map(AsFd::as_fd).collect();
            if harness.frontend.send_bytes(&sent.bytes(), &fds).is_err() {
                break;
            }
            let own_reply = [1, 6, 11, 15, 17, 24, 36, 40, 42, 43].contains(&step.request);
            for tries in 0.. {
                match harness.session.process() {
                    Ok(Progress::Idle) => break,
                    Ok(Progress::Draining) => prop_assert!(tries < 20, "it ends"),
                    Ok(progress) => panic!("{progress:?}"),
                    Err(error) => {
                        // Whatever it is, it is a sentence.
                        prop_assert!(error.to_string().len() > 20);
                        break 'messages;
                    }
                }
            }
            let needs_reply = step.flags & NEED_REPLY != 0;
            if harness.frontend.replied() > 0 {
                prop_assert!(own_reply || needs_reply, "{} has no reply", step.request);
                let reply = harness.frontend.reply();
                prop_assert_eq!(reply.request, step.request);
                prop_assert_eq!(reply.flags, VERSION | 4);
            } else {
                prop_assert!(!own_reply || step.request == 6, "{} has a reply", step.request);
            }
            prop_assert_eq!(harness.frontend.replied(), 0);
        }
        harness.session.backend_mut().drains = 0;
        prop_assert_eq!(harness.session.end(), Poll::Ready(()));
        let Harness { session, memory, frontend, .. } = harness;
        drop((session.into_backend(), frontend));
        prop_assert!(matches!(copies(&memory), None | Some(1)), "the memory is closed");
        prop_assert!(matches!(copies(&short), None | Some(1)));
        drop((kick, call));
        prop_assert!(matches!(events.copies(), None | Some(0)));
    }
}
