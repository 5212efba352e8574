//! What a hostile guest cannot do: reach what is denied, grow what is bounded, or break what is
//! another's.

use std::net::SocketAddr;

use smoltcp::wire::IpProtocol;
use vmring_core::offload::OffloadHeader;
use vmring_nat::{Counter, GuestFrame, Port};

use crate::support::datagram::{echo_request, udp_frame};
use crate::support::kernel::Answer;
use crate::support::port::{Net, config, plain_link};
use crate::support::script::{Script, Segment, each_way, ip_frame};

fn syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let segment = Segment { flags: "S".into(), seq: 7, window: 1000, ..Segment::default() };
    segment.frame(from, to)
}

fn counted(net: &Net, counter: Counter) -> u64 {
    net.nat.counters()[counter]
}

/// T15 and S2: nothing that is no place in the outside world is connected to, and the guest is told at
/// once.
#[test]
fn what_is_denied_is_never_connected_to() {
    let mut net = Net::new(config(false), plain_link());
    let v4 = "127.0.0.1 127.9.9.9 0.0.0.0 169.254.169.254 224.0.0.1 255.255.255.255 240.0.0.1";
    for address in v4.split(' ') {
        let to = SocketAddr::new(address.parse().unwrap(), 80);
        net.send(&[syn(([192, 168, 64, 2], 4000).into(), to)]);
        let told = net.out.frames.pop_front().map(|(frame, _)| [frame[34], frame[35]]);
        // Nobody is told of what goes to many (RFC 1122, 3.2.2).
        let is_to_many = ["224.0.0.1", "255.255.255.255"].contains(&address);
        assert_eq!(told, (!is_to_many).then_some([3, 13]), "{address}");
    }
    let v6 = "::1 :: fe80::1 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1";
    for address in v6.split(' ') {
        let to = SocketAddr::new(address.parse().unwrap(), 80);
        net.send(&[syn("[fd00::2]:4000".parse().unwrap(), to)]);
        let told = net.out.frames.pop_front().map(|(frame, _)| [frame[54], frame[55]]);
        assert_eq!(told, (address != "ff02::1").then_some([1, 1]), "{address}");
    }
    assert_eq!(net.kernel.len(), 0);
    let counters = net.nat.counters();
    let denied = [
        (Counter::DeniedLoopback, 3),
        (Counter::DeniedUnspecified, 2),
        (Counter::DeniedLinkLocal, 2),
        (Counter::DeniedMulticast, 3),
        (Counter::DeniedReserved, 1),
        (Counter::DeniedMapped, 2),
    ];
    for (counter, n) in denied {
        assert_eq!(counters[counter], n, "{counter:?}");
    }
    net.assert_empty();
}

/// S1 and S8: nonsense is dropped, and counted by its reason.
#[test]
fn nonsense_is_dropped_and_counted() {
    let mut net = Net::new(config(false), plain_link());
    let (from, to): (SocketAddr, SocketAddr) =
        (([192, 168, 64, 2], 4000).into(), ([192, 0, 2, 1], 80).into());
    let flags = |flags: &str| {
        let segment = Segment { flags: flags.into(), ..Segment::default() };
        segment.frame(from, to)
    };
    let mut fragment = syn(from, to);
    fragment[20] = 0x20;
    smoltcp::wire::Ipv4Packet::new_unchecked(&mut fragment[14..]).fill_checksum();
    let mut checksum = syn(from, to);
    checksum[24] ^= 1;
    let mut lengths = syn(from, to);
    lengths[46] = 4 << 4;
    let mut runt = syn(from, to);
    runt.truncate(30);
    let frames = [
        (flags("SF"), Counter::TcpFlags),
        (flags("SR"), Counter::TcpFlags),
        (flags("FR"), Counter::TcpFlags),
        (syn(([192, 168, 64, 2], 0).into(), to), Counter::TcpFlags),
        (syn(from, ([192, 0, 2, 1], 0).into()), Counter::TcpFlags),
        (syn(([127, 0, 0, 1], 4000).into(), to), Counter::BadSource),
        (syn(([224, 0, 0, 1], 4000).into(), to), Counter::BadSource),
        (fragment, Counter::Fragment),
        (checksum, Counter::Malformed),
        (lengths, Counter::Malformed),
        (runt, Counter::Malformed),
        (vec![0; 5], Counter::Malformed),
        (vec![0; 60], Counter::NotIp),
        (ip_frame(from.ip(), to.ip(), IpProtocol::Igmp, &[0; 8]), Counter::Protocol),
    ];
    for (frame, counter) in frames {
        let before = counted(&net, counter);
        net.send(&[frame]);
        assert_eq!(counted(&net, counter), before + 1, "{counter:?}");
    }
    assert_eq!((net.kernel.len(), net.out.frames.len()), (0, 0));
}

/// Section 9, 15: a packet whose hop limit is used up is answered, as the first hop of a traceroute is.
#[test]
fn a_used_up_hop_limit_is_answered() {
    let mut net = Net::new(config(false), plain_link());
    let mut frame = syn(([192, 168, 64, 2], 4000).into(), ([192, 0, 2, 1], 80).into());
    frame[22] = 1;
    smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    net.send(&[frame]);
    let (answer, _) = net.out.frames.pop_front().unwrap();
    assert_eq!((&answer[26..30], &answer[34..36]), (&[192, 168, 64, 1][..], &[11, 0][..]));
    let mut frame = syn("[fd00::2]:4000".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap());
    frame[21] = 1;
    net.send(&[frame]);
    let (answer, _) = net.out.frames.pop_front().unwrap();
    assert_eq!(answer[54..56], [3, 0]);
    assert_eq!(net.kernel.len(), 0);
}

/// Goal: an error goes to the single host that has sent its cause, and answers no error (RFC 1122, 3.2.2;
/// RFC 4443, 2.4 e). Method: the hop limit is used up, which is looked at before the source.
#[test]
fn no_error_answers_an_error_or_goes_to_nobody() {
    let mut net = Net::new(config(false), plain_link());
    let port = |address: &str| SocketAddr::new(address.parse().unwrap(), 80);
    let (v4, v6) = (("192.168.64.2", "192.0.2.1"), ("fd00::2", "2001:db8::1"));
    let message = |(from, to): (&str, &str), protocol, kind| {
        let (from, to) = (port(from).ip(), port(to).ip());
        ip_frame(from, to, protocol, &[kind, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9])
    };
    let to = |from: &str, to: &str| syn(port(from), port(to));
    let (icmp, icmpv6) = (IpProtocol::Icmp, IpProtocol::Icmpv6);
    let cases = [
        (message(v4, icmp, 8), true),
        (message(v4, icmp, 3), false),
        (message(v4, icmp, 5), false),
        (message(v4, icmp, 11), false),
        (message(v6, icmpv6, 128), true),
        (message(v6, icmpv6, 1), false),
        (message(v6, icmpv6, 127), false),
        (message(v6, icmpv6, 137), false),
        (to("192.168.64.2", "192.0.2.1"), true),
        (to("127.0.0.1", "192.0.2.1"), false),
        (to("224.0.0.9", "192.0.2.1"), false),
        (to("0.0.0.0", "192.0.2.1"), false),
        (to("255.255.255.255", "192.0.2.1"), false),
        (to("192.168.64.2", "224.0.0.9"), false),
        (to("192.168.64.2", "192.168.64.255"), false),
        (to("fd00::2", "2001:db8::1"), true),
        (to("fe80::2", "2001:db8::1"), true),
        (to("::", "2001:db8::1"), false),
        (to("ff02::9", "2001:db8::1"), false),
        (to("::1", "2001:db8::1"), false),
        (to("fd00::2", "ff0e::9"), false),
    ];
    for (number, (mut frame, told)) in cases.into_iter().enumerate() {
        if frame[12..14] == [8, 0] {
            frame[22] = 1;
            smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        } else {
            frame[21] = 1;
        }
        net.send(&[frame]);
        assert_eq!(net.out.frames.pop_front().is_some(), told, "case {number}");
        assert_eq!(counted(&net, Counter::HopLimit), number as u64 + 1);
    }
}

/// Goal: a guest without an address of the network learns that its link-local one leads nowhere (RFC
/// 4443, 3.1), over each protocol, and opens nothing.
#[test]
fn a_link_local_source_is_beyond_scope() {
    let mut net = Net::new(config(false), plain_link());
    let (from, to): (SocketAddr, SocketAddr) =
        ("[fe80::2]:4000".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap());
    for frame in
        [syn(from, to), udp_frame(from, to, b"?"), echo_request(from.ip(), to.ip(), 1, 1, b"?")]
    {
        net.send(&[frame]);
        let (answer, _) = net.out.frames.pop_front().expect("an error");
        assert_eq!((answer[21], &answer[54..56]), (64, &[1, 2][..]));
    }
    assert_eq!((net.kernel.len(), counted(&net, Counter::BadSource)), (0, 3));
}

/// Section 9, 16: the differentiated services of a guest's SYN are the connection's.
#[test]
fn differentiated_services_are_kept() {
    let mut net = Net::new(config(false), plain_link());
    let mut frame = syn(([192, 168, 64, 2], 4000).into(), ([192, 0, 2, 1], 80).into());
    frame[15] = 46 << 2;
    smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    net.send(&[frame]);
    assert_eq!(net.kernel.with(0, |peer| peer.options.dscp), 46);
}

/// T16: a frame that a driver has padded is trimmed and not dropped. A priority tag is read over.
#[test]
fn padding_and_priority_tags_are_no_data() {
    each_way(|script| {
        script.open();
        let segment = Segment {
            flags: "P.".into(),
            seq: script.isn.wrapping_add(1),
            ack: script.iss.wrapping_add(1),
            window: 512,
            data: vec![crate::support::script::from_guest(0)],
            ..Segment::default()
        };
        let mut frame = segment.frame(script.guest, script.remote);
        frame.resize(frame.len() + 30, 0xee);
        frame.splice(12..12, [0x81, 0, 0x60, 0]);
        script.net.send(&[frame]);
        script.run("peer got 1\n > . 1 ack 2");
    });
}

/// Section 9, 14: TCP's checksum is not verified, because between a guest and this process there is no
/// wire. So a guest may leave it out.
#[test]
fn a_checksum_that_a_guest_leaves_out_is_not_needed() {
    let mut net = Net::new(config(false), plain_link());
    let mut frame = syn(([192, 168, 64, 2], 4000).into(), ([192, 0, 2, 1], 80).into());
    frame[50..52].fill(0);
    net.send(&[frame]);
    assert_eq!(net.kernel.len(), 1);
}

fn from_port(net: &mut Net, port: u32, frames: &[Vec<u8>]) {
    let header = OffloadHeader::NONE;
    let frames: Vec<_> = frames.iter().map(|bytes| GuestFrame { bytes, header }).collect();
    net.nat.from_guest(Port(port), &frames, net.now, &mut net.out);
    net.settle();
}

fn syns(port: u32, count: u16) -> Vec<Vec<u8>> {
    let to = ([192, 0, 2, 1], 80).into();
    let address = [192, 168, 64, 10 + port as u8];
    (1..=count).map(|port| syn((address, port).into(), to)).collect()
}

/// S6 and S10: a flood of SYN opens no more than its port may have half open, another port still
/// connects, and everything ends by itself.
#[test]
fn a_flood_of_syn_is_bounded_and_stops_nobody_else() {
    let mut net = Net::new(config(false), plain_link());
    for _ in 0..5 {
        from_port(&mut net, 0, &syns(0, 5000));
    }
    assert_eq!((net.kernel.open(), net.nat.usage().0), (96, 96));
    assert_eq!(counted(&net, Counter::HalfOpenLimit), 25_000 - 5 * 96);
    from_port(&mut net, 1, &syns(1, 1));
    assert_eq!(net.kernel.open(), 97);
    assert_eq!(net.nat.port_counters(Port(0))[Counter::TcpOpened], 96);
    net.wait(std::time::Duration::from_secs(40));
    net.assert_empty();
}

/// S6: rates, flows, descriptors: each limit holds, and is counted.
#[test]
fn every_limit_holds_and_is_counted() {
    let limited = |change: &dyn Fn(&mut vmring_nat::Limits)| {
        let mut config = config(false);
        config.limits.half_open = 10_000;
        config.limits.port.half_open = 10_000;
        change(&mut config.limits);
        let mut net = Net::new(config, plain_link());
        from_port(&mut net, 0, &syns(0, 2000));
        net
    };
    let net = limited(&|limits| limits.port.new_flows_per_second = 100);
    assert_eq!((net.kernel.open(), counted(&net, Counter::NewFlowLimit)), (100, 1900));
    let net = limited(&|limits| limits.new_flows_per_second = 50);
    assert_eq!((net.kernel.open(), counted(&net, Counter::NewFlowLimit)), (50, 1950));
    let net = limited(&|limits| limits.port.flows = 20);
    assert_eq!((net.kernel.open(), counted(&net, Counter::FlowLimit)), (20, 1980));
    let net = limited(&|limits| limits.flows = 30);
    assert_eq!((net.kernel.open(), counted(&net, Counter::FlowLimit)), (30, 1970));
    let net = limited(&|limits| limits.port.descriptors = 30);
    assert_eq!((net.kernel.open(), counted(&net, Counter::DescriptorLimit)), (30, 1970));
    let net = limited(&|limits| limits.descriptors = 40);
    assert_eq!((net.kernel.open(), counted(&net, Counter::DescriptorLimit)), (40, 1960));
    let net = limited(&|limits| limits.half_open = 60);
    assert_eq!((net.kernel.open(), counted(&net, Counter::HalfOpenLimit)), (60, 1940));
    // A rate gives more when time passes.
    let mut net = limited(&|limits| limits.port.new_flows_per_second = 100);
    net.wait(std::time::Duration::from_millis(500));
    from_port(&mut net, 0, &syns(0, 2000));
    assert_eq!(net.kernel.open(), 150);
}

/// S6: however few descriptors the process may have, one port leaves a quarter of them to others.
#[test]
fn a_port_leaves_descriptors_to_others() {
    let mut config = config(false);
    (config.limits.half_open, config.limits.port.half_open) = (1000, 1000);
    let mut net = Net::new(config, plain_link());
    net.kernel.0.borrow_mut().capabilities.descriptors = 40;
    from_port(&mut net, 0, &syns(0, 20));
    let (from, to) = (([192, 168, 64, 10], 1), ([192, 0, 2, 1], 53));
    let datagram = |port| udp_frame((from.0, port).into(), to.into(), b"?");
    let datagrams: Vec<_> = (1..=50).map(datagram).collect();
    from_port(&mut net, 0, &datagrams);
    assert_eq!(net.kernel.open(), 30);
    from_port(&mut net, 0, &syns(0, 40)[20..]);
    assert_eq!((net.kernel.open(), counted(&net, Counter::DescriptorLimit)), (30, 20));
    from_port(&mut net, 1, &syns(1, 20));
    assert_eq!((net.kernel.open(), counted(&net, Counter::DescriptorLimit)), (40, 30));
    // What a port does not have any more is everybody's.
    let (now, out) = (net.now, &mut net.out);
    net.nat.port_left(Port(0), now, out);
    from_port(&mut net, 1, &syns(1, 60)[20..]);
    assert_eq!(net.kernel.open(), 30);
}

/// S6: flows that have ended, and wait for late segments of the guest, are bounded and keep no other from
/// opening.
#[test]
fn flows_that_have_ended_keep_no_other_from_opening() {
    let mut config = config(false);
    config.limits.flows = 4;
    config.limits.new_flows_per_second = 10_000;
    config.limits.port.new_flows_per_second = 10_000;
    let mut script = Script::new(config, plain_link(), false);
    for port in 1..=1100 {
        script.guest.set_port(port);
        script.open().run(
            "
            peer finishes
            > F. 1 ack 1
            < F. 1 ack 2 win 512
            > . 2 ack 2
            peer got close
            ",
        );
    }
    assert_eq!(script.net.nat.usage(), (vmring_nat::limits::TIME_WAIT_FLOWS, 0));
    script.run("wait 1100\n empty");
}

/// S6: when the kernel's memory for sockets is used up, new sockets get small buffers, and old ones offer
/// small windows.
#[test]
fn the_kernels_memory_is_bounded() {
    let mut config = config(false);
    config.limits.kernel_memory = 1_000_000;
    let mut script = Script::new(config, plain_link(), false);
    script.net.kernel.0.borrow_mut().answer = Answer::Connect;
    script.net.kernel.0.borrow_mut().capacity = 1 << 20;
    script.run("< S 0 win 65535 mss 1000 ws 7\n > S. 0 ack 1\n < . 1 ack 1 win 512");
    script.run("< P. 1:1001 ack 1 win 512");
    let window = script.next().unwrap().window;
    assert!(u32::from(window) << 8 <= 64 << 10, "a window of {window}");
    from_port(&mut script.net, 1, &syns(1, 1));
    assert_eq!(script.net.kernel.with(1, |peer| peer.options.buffers), Some(64 << 10));
    assert_eq!(counted(&script.net, Counter::SmallBuffers), 1);
    // The memory of a flow that ends is free again.
    script.run("peer is open");
    let (now, out) = (script.net.now, &mut script.net.out);
    script.net.nat.port_left(crate::support::port::PORT, now, out);
    script.net.nat.port_left(Port(1), now, out);
    from_port(&mut script.net, 2, &syns(2, 1));
    assert_eq!(script.net.kernel.with(2, |peer| peer.options.buffers), None);
}

/// S6: a port whose sockets cost the kernel as much as it may have gets small buffers, and another does not.
#[test]
fn the_kernels_memory_is_bounded_for_each_port() {
    let mut config = config(false);
    config.limits.port.kernel_memory = 3 * u64::from(vmring_nat::limits::SOCKET_CHARGE);
    let mut net = Net::new(config, plain_link());
    from_port(&mut net, 0, &syns(0, 6));
    from_port(&mut net, 1, &syns(1, 1));
    let buffers = |index| net.kernel.with(index, |peer| peer.options.buffers);
    let small = Some(64 << 10);
    let all: Vec<_> = (0..7).map(buffers).collect();
    assert_eq!(all, [None, None, None, None, small, small, None]);
    assert_eq!(net.nat.port_counters(Port(0))[Counter::SmallBuffers], 2);
}

/// A flow of the guest to a peer that reads everything at once.
struct Upload {
    from: SocketAddr,
    ack: u32,
    seq: u32,
    /// The right edge of its window.
    edge: u32,
}

impl Upload {
    const TO: ([u8; 4], u16) = ([192, 0, 2, 1], 80);

    /// A translator for guests whose outbox has so many places.
    fn net(inbox_frames: u32) -> Net {
        let mut config = config(false);
        config.limits.port.inbox_frames = inbox_frames;
        let net = Net::new(config, plain_link());
        net.kernel.0.borrow_mut().answer = Answer::Connect;
        net.kernel.0.borrow_mut().capacity = 4 << 20;
        net
    }

    /// Opens the flow of this number, from 1 on.
    fn open(net: &mut Net, number: u16) -> Self {
        let from = SocketAddr::from(([192, 168, 64, 2], number));
        let syn = Segment { flags: "S".into(), shift: Some(7), ..Segment::default() };
        net.send(&[syn.frame(from, Self::TO.into())]);
        let (frame, header) = net.out.frames.pop_front().unwrap();
        let (answer, _) = Segment::parse(&frame, &header, &net.out.link).unwrap();
        assert!(usize::from(answer.window) <= 16 * 1460);
        Self { from, ack: answer.seq.wrapping_add(1), seq: 1, edge: 1 + u32::from(answer.window) }
    }

    fn window(&self) -> u32 {
        self.edge - self.seq
    }

    /// Sends as much as the window allows, but no more than `most` bytes.
    fn send(&mut self, net: &mut Net, most: u32) {
        let mut frames = Vec::new();
        let end = self.edge.min(self.seq.saturating_add(most));
        while self.seq < end {
            let (seq, data) = (self.seq, vec![0; (end - self.seq).min(1460) as usize]);
            self.seq += data.len() as u32;
            let (flags, ack) = ("P.".into(), self.ack);
            let segment = Segment { flags, seq, ack, window: 512, data, ..Segment::default() };
            frames.push(segment.frame(self.from, Self::TO.into()));
        }
        net.send(&frames);
        net.kernel.read(usize::from(self.from.port()) - 1, usize::MAX);
        let (frame, header) = net.out.frames.pop_back().unwrap();
        let (answer, _) = Segment::parse(&frame, &header, &net.out.link).unwrap();
        assert_eq!(answer.ack, self.seq);
        let edge = answer.ack + (u32::from(answer.window) << 8);
        // The field of the header is in units of 256 bytes.
        assert!(edge + 256 > self.edge, "a window that is taken back");
        self.edge = edge.max(self.edge);
        net.out.frames.clear();
    }

    fn wait(net: &mut Net, millis: u64) {
        net.wait(std::time::Duration::from_millis(millis));
        net.out.frames.clear();
    }
}

/// Windows: what all busy flows of a port may send fits into the port's inbox.
#[test]
fn the_windows_of_a_port_fit_its_inbox() {
    let mut net = Upload::net(80);
    let mut flows: Vec<_> = (1..=8).map(|number| Upload::open(&mut net, number)).collect();
    // Each guest's flow fills its window, again and again.
    for round in 0..20 {
        for flow in &mut flows {
            flow.send(&mut net, u32::MAX);
        }
        let all: u32 = flows.iter().map(Upload::window).sum();
        // In the first second nobody knows how many will be busy, and each has two segments at least.
        if round > 7 {
            let range = 20 * 1460..=41 * 1460;
            assert!(range.contains(&all), "round {round}: windows of {all}");
        }
        Upload::wait(&mut net, 300);
    }
}

/// Windows: a flow that has had all of them gives room to flows that begin, within a second, and what it was
/// offered is not taken back.
#[test]
fn an_old_flow_makes_room_for_new_ones() {
    let mut net = Upload::net(80);
    let mut flows = vec![Upload::open(&mut net, 1)];
    for _ in 0..30 {
        flows[0].send(&mut net, u32::MAX);
        Upload::wait(&mut net, 100);
    }
    assert!(flows[0].window() >= 38 * 1460, "a window of {}", flows[0].window());
    flows.extend((2..=4).map(|number| Upload::open(&mut net, number)));
    for _ in 0..10 {
        for flow in &mut flows {
            flow.send(&mut net, u32::MAX);
        }
        Upload::wait(&mut net, 100);
    }
    for flow in &flows {
        let range = 8 * 1460..=11 * 1460;
        assert!(range.contains(&flow.window()), "a window of {}", flow.window());
    }
}

/// Windows: a flow that has had all of them, and now sends little, keeps its window and does not keep others
/// from sending.
#[test]
fn a_flow_that_sends_little_leaves_others_their_windows() {
    let mut net = Upload::net(400);
    let mut old = Upload::open(&mut net, 1);
    for _ in 0..20 {
        old.send(&mut net, u32::MAX);
        Upload::wait(&mut net, 100);
    }
    assert!(old.window() >= 195 * 1460, "a window of {}", old.window());
    let mut new = Upload::open(&mut net, 2);
    for _ in 0..25 {
        old.send(&mut net, 100);
        new.send(&mut net, u32::MAX);
        Upload::wait(&mut net, 100);
    }
    assert!(old.window() >= 190 * 1460, "a window of {}", old.window());
    let range = 95 * 1460..=101 * 1460;
    assert!(range.contains(&new.window()), "a window of {}", new.window());
}

/// Windows: a guest whose frames hold several segments may send more at once, and no longer when its frames
/// have become short.
#[test]
fn windows_follow_the_frames_of_the_guest() {
    let mut config = config(false);
    config.limits.port.inbox_frames = 80;
    let mut net = Net::new(config, plain_link());
    net.kernel.0.borrow_mut().answer = Answer::Connect;
    net.kernel.0.borrow_mut().capacity = 8 << 20;
    let from = SocketAddr::from(([192, 168, 64, 2], 1));
    let to: SocketAddr = ([192, 0, 2, 1], 80).into();
    let syn = Segment { flags: "S".into(), shift: Some(7), ..Segment::default() };
    net.send(&[syn.frame(from, to)]);
    let (frame, header) = net.out.frames.pop_front().unwrap();
    let (answer, _) = Segment::parse(&frame, &header, &net.out.link).unwrap();
    let (ack, mut seq) = (answer.seq.wrapping_add(1), 1);
    for (len, count, range) in [
        (1460, 20, 38 * 1460..=40 * 1460),
        (20_000, 20, 300_000..=400_000),
        (1460, 400, 38 * 1460..=40 * 1460),
    ] {
        let mut window = 0;
        for _ in 0..count {
            let (flags, data) = ("P.".into(), vec![0; len]);
            let segment = Segment { flags, seq, ack, window: 512, data, ..Segment::default() };
            net.send(&[segment.frame(from, to)]);
            seq += len as u32;
            net.kernel.read(0, usize::MAX);
            let (frame, header) = net.out.frames.pop_back().unwrap();
            let (answer, _) = Segment::parse(&frame, &header, &net.out.link).unwrap();
            assert_eq!(answer.ack, seq);
            window = u32::from(answer.window) << 8;
            net.out.frames.clear();
        }
        assert!(range.contains(&window), "frames of {len}: a window of {window}");
    }
}

/// A guest gets no more than so many errors and resets for what belongs to nothing.
#[test]
fn answers_to_what_belongs_to_nothing_are_limited() {
    let mut net = Net::new(config(false), plain_link());
    let to: SocketAddr = ([192, 0, 2, 1], 80).into();
    let ack = Segment { flags: ".".into(), ..Segment::default() };
    let frames: Vec<_> =
        (1..=5000).map(|port| ack.frame(SocketAddr::from(([192, 168, 64, 2], port)), to)).collect();
    net.send(&frames);
    assert_eq!(net.out.frames.len(), 1000);
    assert_eq!(counted(&net, Counter::ErrorLimit), 4000);
    assert_eq!(counted(&net, Counter::NoFlow), 5000);
    net.assert_empty();
}

/// Goal: flows for which there is no ring wait for one, for as long as it takes, and no port has all.
#[test]
fn flows_without_a_ring_wait_for_one() {
    let mut config = config(true);
    config.limits.port.half_open = 1000;
    config.limits.half_open = 1000;
    let mut net = Net::new(config, plain_link());
    net.kernel.0.borrow_mut().answer = Answer::Connect;
    let to: SocketAddr = ([192, 0, 2, 1], 80).into();
    let port = crate::support::port::PORT.0;
    let open = |net: &mut Net, port: u32, guest_port: u16| {
        let from = SocketAddr::from(([192, 168, 64, 20 + port as u8], guest_port));
        from_port(net, port, &[syn(from, to)]);
        let (frame, header) = net.out.frames.pop_back().unwrap();
        let (answer, _) = Segment::parse(&frame, &header, &net.out.link).unwrap();
        let ack = answer.seq.wrapping_add(1);
        let segment =
            Segment { flags: ".".into(), seq: 8, ack, window: 1000, ..Segment::default() };
        from_port(net, port, &[segment.frame(from, to)]);
        net.kernel.write(net.kernel.len() - 1, b"bytes");
        net.settle();
        (from, ack)
    };
    // The guest acknowledges nothing, so its flows keep their rings.
    let flows: Vec<_> = (1..=200).map(|guest_port| open(&mut net, port, guest_port)).collect();
    let bytes =
        |net: &Net| net.out.frames.iter().filter(|(frame, _)| frame.ends_with(b"bytes\0")).count();
    assert_eq!(bytes(&net), 192);
    assert!(counted(&net, Counter::RingsUsedUp) >= 8);
    net.out.frames.clear();
    // Another port has its share.
    open(&mut net, 1, 1);
    assert_eq!(bytes(&net), 1);
    // Those that wait are not given up, and get the first ring that is free. The guest keeps the others
    // by a window that stays closed.
    let ack = |(from, seq): (SocketAddr, u32), len: u32, window| {
        let (flags, ack) = (".".into(), seq.wrapping_add(len));
        Segment { flags, seq: 8, ack, window, ..Segment::default() }.frame(from, to)
    };
    for _ in 0..70 {
        net.wait(std::time::Duration::from_secs(20));
        let answers: Vec<_> = flows[..192].iter().map(|&flow| ack(flow, 0, 0)).collect();
        from_port(&mut net, port, &answers);
    }
    assert_eq!(net.kernel.with(195, |peer| peer.closed), None, "given up");
    net.out.frames.clear();
    let answers: Vec<_> = flows[..50].iter().map(|&flow| ack(flow, 5, 1000)).collect();
    from_port(&mut net, port, &answers);
    net.out.frames.clear();
    net.wait(std::time::Duration::from_secs(1));
    let got = bytes(&net);
    assert!(got >= 8, "{got} flows got a ring");
}
