//! A guest with another TCP, smoltcp's, over a link that loses, doubles and reorders frames, with peers
//! and programs that read and write as they like.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, HardwareAddress, IpCidr,
};
use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_embedded::software;
use vmring_nat::{Counter, Link};

use crate::support::kernel::Answer;
use crate::support::port::{GATEWAY_MAC, GUEST_MAC, Net, config, plain_link};
use crate::support::script::{Segment, from_guest, from_world, stream};

/// Random numbers that can be repeated (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n.max(1)
    }

    fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }
}

/// The guest's network card. Its packets have no Ethernet header.
#[derive(Default)]
pub(crate) struct Card {
    pub(crate) received: VecDeque<Vec<u8>>,
    pub(crate) sent: Vec<Vec<u8>>,
}

pub(crate) struct Received(Vec<u8>);
pub(crate) struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities
    }
}

/// What the link and the programs are like.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    rings_only: bool,
    v6: bool,
    offload: bool,
    loss: u64,
    doubled: u64,
    reordered: u64,
    guest_buffer: usize,
    kernel_buffer: usize,
    from_guest: usize,
    from_world: usize,
    /// How often, in percent of the turns, a program reads or writes.
    eager: u64,
    /// Whether a peer connects to the guest.
    inbound: bool,
    /// Whether the port is full at times.
    full: bool,
    /// Whether nothing happens to frames of the guest and to acknowledgments for it. smoltcp 0.12 sends nothing again once it has got
    /// FIN: its timer is set to idle by any acknowledgment in CLOSE-WAIT, CLOSING and LAST-ACK. So where
    /// frames of the guest are lost, the peer closes when everything of the guest is acknowledged.
    calm: bool,
}

fn case() -> impl Strategy<Value = Case> {
    (
        (any::<u64>(), any::<[bool; 6]>()),
        (0u64..20, 0u64..20, 0u64..20, 5u64..100),
        (500usize..70_000, 1500usize..100_000, 0usize..60_000, 0usize..60_000),
    )
        .prop_map(|(flags, rates, sizes)| Case {
            seed: flags.0 | 1,
            rings_only: flags.1[0],
            v6: flags.1[1],
            offload: flags.1[2],
            inbound: flags.1[3],
            full: flags.1[4],
            calm: flags.1[5],
            loss: rates.0,
            doubled: rates.1,
            reordered: rates.2,
            eager: rates.3,
            guest_buffer: sizes.0,
            kernel_buffer: sizes.1,
            from_guest: sizes.2,
            from_world: sizes.3,
        })
}

/// What a link does to frames.
fn disturb<F: Clone>(frames: &mut Vec<F>, case: &Case, dice: &mut Dice) {
    let mut out = Vec::new();
    for frame in frames.drain(..) {
        if dice.percent(case.loss) {
            continue;
        }
        if dice.percent(case.doubled) {
            out.push(frame.clone());
        }
        out.push(frame);
    }
    for at in 1..out.len() {
        if dice.percent(case.reordered) {
            let to = at - 1 - dice.below(at as u64) as usize;
            out.swap(at, to);
        }
    }
    *frames = out;
}

/// The packets of a frame for the guest: it is cut and summed as its header says.
pub(crate) fn deliver(frame: &[u8], header: &OffloadHeader, to: &mut VecDeque<Vec<u8>>) {
    let mut frame = frame.to_vec();
    if let Ok(segments) = software::Segments::new(header, &frame) {
        for index in 0..segments.count() {
            let mut segment = vec![0; segments.len_max()];
            let len = segments.write(index, &mut segment).unwrap();
            to.push_back(segment[14..len].to_vec());
        }
        return;
    }
    software::complete_checksum(header, &mut frame).unwrap();
    to.push_back(frame[14..].to_vec());
}

fn run(case: &Case) -> Result<(), TestCaseError> {
    let mut dice = Dice(case.seed);
    let link = if case.offload {
        Link { offloads: Offloads::ALL, longest: 65_549, ..plain_link() }
    } else {
        plain_link()
    };
    let mut net = Net::new(config(case.rings_only), link);
    {
        let mut world = net.kernel.0.borrow_mut();
        (world.answer, world.capacity) = (Answer::Connect, case.kernel_buffer);
    }
    let (guest, remote): (SocketAddr, SocketAddr) = if case.v6 {
        ("[fd00::2]:40000".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap())
    } else {
        (([192, 168, 64, 2], 40_000).into(), ([192, 0, 2, 80], 80).into())
    };
    let mut card = Card::default();
    let mut settings = Config::new(HardwareAddress::Ip);
    settings.random_seed = dice.below(u64::MAX);
    let clock = |now: Duration| Instant::from_micros(now.as_micros() as i64);
    let mut interface = Interface::new(settings, &mut card, clock(net.now));
    interface.update_ip_addrs(|addresses| {
        addresses.push(IpCidr::new(guest.ip().into(), if case.v6 { 64 } else { 24 })).unwrap();
    });
    if case.v6 {
        interface.routes_mut().add_default_ipv6_route("fd00::1".parse().unwrap()).unwrap();
    } else {
        interface.routes_mut().add_default_ipv4_route([192, 168, 64, 1].into()).unwrap();
    }
    let buffer = || tcp::SocketBuffer::new(vec![0; case.guest_buffer]);
    let mut sockets = SocketSet::new(Vec::new());
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(dice.percent(50));
    if case.inbound {
        socket.listen(guest.port()).unwrap();
        net.accept(remote, guest);
    } else {
        socket.connect(interface.context(), remote, guest.port()).unwrap();
    }
    let handle = sockets.add(socket);

    let (mut written, mut read, mut peer_wrote) = (0, Vec::<u8>::new(), 0);
    let (mut guest_closed, mut peer_closed) = (false, false);
    let (mut idle, mut ending, mut gave_up) = (0, 0, false);
    let (mut still, mut sent_before, mut acknowledgment) = (0, 0, None::<(u32, Vec<u8>)>);
    for turn in 0.. {
        if turn == 20_000 {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            let (state, waits) = (socket.state(), (socket.send_queue(), socket.recv_queue()));
            let (counters, flows) = (net.nat.counters(), net.nat.tcp_flows().next());
            let ends = (guest_closed, peer_closed, written, read.len(), peer_wrote);
            prop_assert!(
                false,
                "it does not end: {state} {waits:?} {ends:?} {counters:?} {flows:?}"
            );
        }
        let before = (written, read.len(), peer_wrote, net.kernel.len());
        // The guest's program.
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if dice.percent(case.eager) && socket.can_send() && written < case.from_guest {
            let len = dice.below(5000) as usize + 1;
            let end = case.from_guest.min(written + len);
            written += socket.send_slice(&stream(from_guest, written, end)).unwrap();
        }
        // After TIME-WAIT, smoltcp forgets what was not read.
        let last = socket.state() == tcp::State::TimeWait;
        if (last || dice.percent(case.eager)) && socket.can_recv() {
            let mut bytes = vec![0; dice.below(5000) as usize + 1];
            let len = socket.recv_slice(&mut bytes).unwrap();
            read.extend(&bytes[..len]);
        }
        let all_sent = written == case.from_guest && socket.send_queue() == 0;
        if all_sent && !guest_closed && socket.may_send() && dice.percent(20) {
            socket.close();
            guest_closed = true;
        }
        // The peer.
        if net.kernel.len() > 0 {
            if dice.percent(case.eager) && peer_wrote < case.from_world {
                let end = case.from_world.min(peer_wrote + dice.below(9000) as usize + 1);
                net.kernel.write(0, &stream(from_world, peer_wrote, end));
                peer_wrote = end;
            }
            if dice.percent(case.eager) {
                net.kernel.read(0, dice.below(9000) as usize);
            }
            let may_close = case.calm || all_sent;
            if peer_wrote == case.from_world && may_close && !peer_closed && dice.percent(20) {
                net.kernel.finish(0);
                peer_closed = true;
            }
        }
        // The link.
        if case.full && dice.percent(30) {
            net.set_space(dice.below(4) as usize);
        } else {
            net.set_space(1000);
        }
        net.settle();
        interface.poll(clock(net.now), &mut card, &mut sockets);
        let mut frames: Vec<_> = card.sent.drain(..).map(|packet| with_ethernet(&packet)).collect();
        if !case.calm {
            disturb(&mut frames, case, &mut dice);
        }
        net.send(&frames);
        let mut frames: Vec<_> = net.out.frames.drain(..).collect();
        let is_bare = |(frame, _): &(Vec<u8>, _)| case.calm && frame.len() <= 74;
        let bare: Vec<_> = frames.extract_if(.., |frame| is_bare(frame)).collect();
        disturb(&mut frames, case, &mut dice);
        frames.extend(bare);
        for (frame, header) in &frames {
            deliver(frame, header, &mut card.received);
            // The latest acknowledgment without data. Questions have an older number.
            let (segment, _) = Segment::parse(frame, header, &net.out.link).expect("TCP");
            let newest = acknowledgment.as_ref().map_or(segment.seq, |(seq, _)| *seq);
            if segment.flags == "."
                && segment.data.is_empty()
                && segment.seq.wrapping_sub(newest) < 1 << 31
            {
                acknowledgment = Some((segment.seq, frame.clone()));
            }
        }
        // smoltcp 0.12 may forget in other states too that something of it is on its way. It remembers
        // when an acknowledgment comes several times.
        let sent =
            if net.kernel.len() > 0 { net.kernel.with(0, |peer| peer.sent.len()) } else { 0 };
        still = if sent == sent_before { still + 1 } else { 0 };
        sent_before = sent;
        if still % 500 == 499
            && let Some((_, frame)) = &acknowledgment
        {
            for _ in 0..5 {
                deliver(frame, &OffloadHeader::NONE, &mut card.received);
            }
        }
        interface.poll(clock(net.now), &mut card, &mut sockets);

        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let ended = matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait);
        if ended && guest_closed && peer_closed && !socket.can_recv() && net.nat.usage().0 == 0 {
            break;
        }
        // Its FIN may be lost for ever; see `calm`.
        ending += u32::from(matches!(socket.state(), tcp::State::Closing | tcp::State::LastAck));
        if ending == 2000 {
            socket.abort();
            gave_up = true;
        }
        // A handshake of which every attempt is lost: once in some thousand cases.
        if net.nat.counters()[Counter::GuestSilent] > 0 {
            prop_assert_eq!(net.nat.counters()[Counter::TcpEstablished], 0, "given up");
            prop_assert_eq!((net.nat.usage(), net.kernel.open()), ((0, 0), 0));
            return Ok(());
        }
        // Time passes: a little, or if nothing happens, up to what somebody waits for.
        let quiet = before == (written, read.len(), peer_wrote, net.kernel.len())
            && card.sent.is_empty()
            && card.received.is_empty();
        idle = if quiet { idle + 1 } else { 0 };
        if idle > 200 / case.eager {
            let next = net.next.unwrap_or(Duration::MAX).saturating_sub(net.now);
            let guest = interface.poll_delay(clock(net.now), &sockets);
            let guest =
                guest.map_or(Duration::MAX, |delay| Duration::from_micros(delay.total_micros()));
            let wait = next.min(guest).clamp(Duration::from_millis(1), Duration::from_secs(60));
            net.wait(wait);
        } else {
            net.wait(Duration::from_micros(dice.below(2000)));
        }
    }
    prop_assert_eq!(net.kernel.len(), 1, "one connection");
    let (sent, closed, unread) =
        net.kernel.with(0, |peer| (std::mem::take(&mut peer.sent), peer.closed, peer.unread));
    let to_peer = stream(from_guest, 0, case.from_guest);
    prop_assert!(
        sent == to_peer,
        "the peer got {} bytes of {}, {}, given up: {gave_up}, {:?}",
        sent.len(),
        to_peer.len(),
        if to_peer.starts_with(&sent) { "the first ones" } else { "others" },
        net.nat.counters()
    );
    let expected = stream(from_world, 0, case.from_world);
    let wrong = read.iter().zip(&expected).position(|(is, should)| is != should);
    prop_assert!(
        read == expected,
        "the guest has {} of {} bytes, and {wrong:?} is wrong: {:?}",
        read.len(),
        expected.len(),
        net.nat.counters()
    );
    prop_assert!(closed == Some(false) || gave_up, "the peer got a reset");
    prop_assert_eq!(unread, 0);
    prop_assert_eq!(net.nat.usage(), (0, 0));
    prop_assert_eq!(net.kernel.open(), 0);
    Ok(())
}

pub(crate) fn with_ethernet(packet: &[u8]) -> Vec<u8> {
    let ethertype =
        if packet[0] >> 4 == 4 { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
    let mut frame = vec![0; 14 + packet.len()];
    EthernetRepr {
        src_addr: EthernetAddress(GUEST_MAC),
        dst_addr: EthernetAddress(GATEWAY_MAC),
        ethertype,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut frame));
    frame[14..].copy_from_slice(packet);
    frame
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 0, ..ProptestConfig::default() })]
    /// Goal: bytes in are bytes out, both ways, and nothing is left over: no flow, no descriptor, no
    /// byte.
    /// Method: one connection in either direction, with small and large buffers, programs that read and
    /// write when they like, and a link that loses, doubles and reorders up to a fifth of its frames.
    #[test]
    fn bytes_in_are_bytes_out(case in case()) {
        run(&case)?;
    }
}
