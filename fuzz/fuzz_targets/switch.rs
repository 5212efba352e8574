//! Hostile frames, with hostile offload headers, through the switch. It must not panic, every frame that
//! arrives must be complete, nobody may get work that he did not negotiate, and every buffer must come
//! back.
#![no_main]

mod frames;

use arbitrary::Arbitrary;
use core::time::Duration;
use frames::{Frame, GATEWAY, LAST, MASK, PREFIX};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vmring_core::offload::{Checksum, Gso, LEN, OffloadHeader, Offloads};
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::limits::VLAN_TAG_LEN;
use vmring_embedded::software::{self, Left};
use vmring_embedded::{
    AddressRange, DropReason, Ipv6Config, Network, NetworkConfig, NetworkMode, Packet, Port,
    PortConfig, PortPolicy, Sent, SourceRule,
};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    isolated: bool,
    gateway: bool,
    /// Whether the gateway has IPv6.
    ipv6: bool,
    /// Whether the first port is the uplink.
    uplink: bool,
    /// The second port's rule.
    rule: Rule,
    /// The offloads of both ports, a bit for each.
    offloads: [u8; 2],
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
    Send { from_second: bool, frame: Frame<'a>, header: Option<[u8; LEN]>, ip: Option<Ip> },
    Post { to_second: bool },
    Collect { of_second: bool },
    Recall { of_second: bool },
    Route { is_there: bool },
    Wait { seconds: u16 },
}

/// Turns a frame into an IP packet that can be cut, or few inputs would get past the first check.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Ip {
    v4: bool,
    tcp: bool,
    more: u16,
    segment_size: u16,
}

impl Ip {
    fn follow(self, frame: &mut Vec<u8>) -> OffloadHeader {
        let ip_len = if self.v4 { 20 } else { 40 };
        let (transport_len, field) = if self.tcp { (20, 16) } else { (8, 6) };
        let start = 14 + ip_len;
        frame.resize(frame.len().max(start + transport_len) + usize::from(self.more), 7);
        let len = frame.len() - start;
        let protocol = if self.tcp { 6 } else { 17 };
        if self.v4 {
            frame[12..14].copy_from_slice(&[8, 0]);
            frame[14] = 0x45;
            frame[16..18].copy_from_slice(&((len + 20) as u16).to_be_bytes());
            (frame[20], frame[21], frame[23]) = (0, 0, protocol);
        } else {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            (frame[14], frame[20]) = (0x60, protocol);
            frame[18..20].copy_from_slice(&(len as u16).to_be_bytes());
        }
        match self.tcp {
            true => (frame[start + 12], frame[start + 13]) = (0x50, 0x10),
            false => frame[start + 4..start + 6].copy_from_slice(&(len as u16).to_be_bytes()),
        }
        let gso = match (self.tcp, self.v4) {
            (true, true) => Gso::TcpV4,
            (true, false) => Gso::TcpV6,
            (false, _) => Gso::UdpL4,
        };
        OffloadHeader {
            checksum: Checksum::Partial { start: start as u16, offset: field },
            gso: if self.segment_size == 0 { Gso::None } else { gso },
            segment_size: self.segment_size,
            ..OffloadHeader::NONE
        }
    }
}

fn offloads(bits: u8) -> Offloads {
    let mut offloads = Offloads::default();
    (offloads.checksum, offloads.tso4) = (bits & 1 != 0, bits & 2 != 0);
    (offloads.tso6, offloads.uso) = (bits & 4 != 0, bits & 8 != 0);
    offloads
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
    config.ipv6 = (input.gateway && input.ipv6).then(|| Ipv6Config::new(PREFIX));
    config.inbox_depth = 4;
    config.overflow_depth = Some(2);
    let clock = Arc::new(ManualClock::new());
    let network = Network::<Vec<u8>>::with_clock(config, Box::new(Shared(clock.clone())))
        .expect("the configuration is possible");
    let frame_len = network.max_packet_size();
    let gateway = network.gateway().map_or([2; 6], |gateway| gateway.mac().into_array());
    let join = |id| {
        let wake = Arc::new(|| {});
        let uplink = input.uplink && id == 1;
        let isolated = input.isolated && id == 1 && !uplink;
        let source = if id == 2 { input.rule.source() } else { SourceRule::Any };
        let policy = PortPolicy { source, ..PortPolicy::default() };
        let offloads = offloads(input.offloads[usize::from(id) - 1]);
        let config =
            PortConfig { isolated, uplink, policy, offloads, ..PortConfig::new([id; 16], wake) };
        network.join(config).expect("there is room for two")
    };
    let ports = [join(1), join(2)];
    // What each does itself, the longest packet, and the bytes in front of it.
    let able = ports.each_ref().map(Port::offloads);
    let longest = ports.each_ref().map(Port::max_packet_size);
    let front = able.map(|able| if able.virtio_header { LEN } else { 0 });
    let rooms = [0, 1].map(|i| front[i] + longest[i]);
    let (mut ports, mut posted) = (ports.map(Port::split), [0usize; 2]);
    // The one address that the second port has sent from, if its rule says that it has one.
    let mut only = None;
    let macs = [0, 1].map(|i: usize| ports[i].0.mac().into_array());

    for step in &input.steps {
        match step {
            Step::Send { from_second, frame, header, ip } => {
                let from = usize::from(*from_second);
                let mut frame = frame.bytes(&macs, gateway);
                let asked = ip.map(|ip| ip.follow(&mut frame));
                let drawn = header.and_then(|header| OffloadHeader::parse(&header).ok());
                let header = asked.or(drawn).unwrap_or_default();
                let sender = &mut ports[from].1;
                let sent = sender.send_packet(Packet::from(&frame[..]).with_offload(&header));
                if *from_second && !matches!(input.rule, Rule::Any) {
                    let source = frame.get(6..12).map(<[u8]>::to_vec);
                    match sent {
                        Sent::Forwarded | Sent::Flooded { .. } | Sent::Gateway => {
                            assert_eq!(only.get_or_insert_with(|| source.clone()), &source);
                        }
                        _ => {}
                    }
                }
                let asks = !header.is_plain();
                match sent {
                    Sent::Dropped(DropReason::Runt) => assert!(frame.len() < 14),
                    Sent::Dropped(DropReason::TooBig) => {
                        // A frame without a tag is shorter than one with.
                        let is_long = frame.len() > frame_len - VLAN_TAG_LEN;
                        assert!(is_long || asks && header.gso != Gso::None);
                    }
                    Sent::Dropped(DropReason::BadOffload | DropReason::NotSegmentable) => {
                        assert!(asks);
                    }
                    _ if asks => {
                        assert_eq!(software::left_by(&able[from], &header), Left::Nothing);
                        assert!((14..=longest[from]).contains(&frame.len()));
                    }
                    _ => assert!((14..=frame_len).contains(&frame.len())),
                }
                sender.flush();
            }
            Step::Post { to_second } => {
                let i = usize::from(*to_second);
                match ports[i].0.post(vec![0; rooms[i]]) {
                    Ok(()) => posted[i] += 1,
                    Err(buffer) => assert_eq!(buffer.len(), rooms[i]),
                }
            }
            Step::Collect { of_second } => {
                let i = usize::from(*of_second);
                if let Some((buffer, len)) = ports[i].0.collect() {
                    assert!(buffer.len() == rooms[i] && (14..=longest[i]).contains(&len));
                    if front[i] > 0 {
                        let header = buffer.first_chunk().map(OffloadHeader::parse);
                        let header = header.expect("12 bytes").expect("a sound header");
                        assert_eq!(header.num_buffers, 1);
                        assert_eq!(header.validate(len), Ok(()));
                        assert_eq!(software::left_by(&able[i], &header), Left::Nothing);
                        assert!(header.gso != Gso::None || len <= frame_len);
                    } else {
                        assert!(len <= frame_len);
                    }
                    posted[i] -= 1;
                }
            }
            Step::Recall { of_second } => {
                let i = usize::from(*of_second);
                posted[i] -= ports[i].0.recall(|buffer| assert_eq!(buffer.len(), rooms[i]));
            }
            Step::Route { is_there } => network.set_ipv6_router(*is_there),
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
