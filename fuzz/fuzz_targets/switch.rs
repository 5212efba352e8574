//! Hostile frames through the switch. It must not panic, every frame that arrives must be complete,
//! and every buffer must come back.
#![no_main]

mod frames;

use arbitrary::Arbitrary;
use core::time::Duration;
use frames::{Frame, GATEWAY, LAST, MASK};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::{
    AddressRange, DropReason, Network, NetworkConfig, NetworkMode, PortConfig, PortPolicy, Sent,
    SourceRule,
};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    isolated: bool,
    gateway: bool,
    /// Whether the first port is the uplink.
    uplink: bool,
    /// The second port's rule.
    rule: Rule,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Rule {
    Any,
    Fixed,
    LearnOnce,
}

impl Rule {
    fn source(self) -> SourceRule {
        match self {
            Rule::Any => SourceRule::Any,
            Rule::Fixed => SourceRule::Fixed,
            Rule::LearnOnce => SourceRule::LearnOnce,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Send { from_second: bool, frame: Frame<'a> },
    Post { to_second: bool },
    Collect { of_second: bool },
    Recall { of_second: bool },
    Wait { seconds: u16 },
}

/// A clock that the test advances.
struct Shared(Arc<ManualClock>);

impl Clock for Shared {
    fn now(&self) -> Duration {
        self.0.now()
    }
}

fuzz_target!(|input: Input| {
    let mut config = NetworkConfig::of(NetworkMode::Shared);
    config.gateway = input.gateway;
    config.ipv4 = AddressRange { gateway: GATEWAY, end: LAST, mask: MASK };
    config.inbox_depth = 4;
    config.overflow_depth = Some(2);
    let clock = Arc::new(ManualClock::new());
    let network = Network::<Vec<u8>>::with_clock(config, Box::new(Shared(clock.clone())))
        .expect("the configuration is possible");
    let room = network.max_packet_size();
    let gateway = network.gateway().map_or([2; 6], |gateway| gateway.mac().into_array());
    let join = |id| {
        let wake = Arc::new(|| {});
        let uplink = input.uplink && id == 1;
        let isolated = input.isolated && id == 1 && !uplink;
        let source = if id == 2 { input.rule.source() } else { SourceRule::Any };
        let policy = PortPolicy { source, ..PortPolicy::default() };
        let config = PortConfig { isolated, uplink, policy, ..PortConfig::new([id; 16], wake) };
        network.join(config).expect("there is room for two").split()
    };
    let (mut ports, mut posted) = ([join(1), join(2)], [0usize; 2]);
    // The one address that the second port has sent from, if its rule says that it has one.
    let mut only = None;
    let macs = [0, 1].map(|i: usize| ports[i].0.mac().into_array());

    for step in &input.steps {
        match step {
            Step::Send { from_second, frame } => {
                let frame = frame.bytes(&macs, gateway);
                let sender = &mut ports[usize::from(*from_second)].1;
                let sent = sender.send(&frame);
                if *from_second && !matches!(input.rule, Rule::Any) {
                    let source = frame.get(6..12).map(<[u8]>::to_vec);
                    match sent {
                        Sent::Forwarded | Sent::Flooded { .. } | Sent::Gateway => {
                            assert_eq!(only.get_or_insert_with(|| source.clone()), &source);
                        }
                        _ => {}
                    }
                }
                match sent {
                    Sent::Dropped(DropReason::Runt) => assert!(frame.len() < 14),
                    Sent::Dropped(DropReason::TooBig) => assert!(frame.len() > room),
                    _ => assert!((14..=room).contains(&frame.len())),
                }
                sender.flush();
            }
            Step::Post { to_second } => {
                let i = usize::from(*to_second);
                match ports[i].0.post(vec![0; room]) {
                    Ok(()) => posted[i] += 1,
                    Err(buffer) => assert_eq!(buffer.len(), room),
                }
            }
            Step::Collect { of_second } => {
                let i = usize::from(*of_second);
                if let Some((buffer, len)) = ports[i].0.collect() {
                    assert!(buffer.len() == room && (14..=room).contains(&len));
                    posted[i] -= 1;
                }
            }
            Step::Recall { of_second } => {
                let i = usize::from(*of_second);
                posted[i] -= ports[i].0.recall(|buffer| assert_eq!(buffer.len(), room));
            }
            Step::Wait { seconds } => clock.advance(Duration::from_secs((*seconds).into())),
        }
    }

    for (i, (receiver, _)) in ports.iter_mut().enumerate() {
        receiver.close();
        while receiver.collect().is_some() {
            posted[i] -= 1;
        }
        posted[i] -= receiver.recall(drop);
        assert_eq!(posted[i], 0, "every buffer came back");
    }
});
