//! Scripts in the manner of packetdrill: what the guest sends, what it gets, and what the peer does,
//! line by line.
//!
//! ```text
//! < S 0 win 65535 mss 1460 ws 7    the guest sends SYN; sequence numbers count from its first
//! peer connects                    the host's connection is made
//! > S. 0 ack 1 mss 1460 ws 8       the guest gets SYN,ACK; numbers count from the translator's first
//! < . 1 ack 1 win 512
//! < P. 1:101 ack 1 win 512         100 bytes
//! & P. 101:201 ack 1 win 512       in the same batch as the line before
//! peer got 200                     the peer has got 200 bytes in all, and the right ones
//! > . 1 ack 201
//! nothing                          the guest gets nothing more
//! ```
//!
//! Flags: S is SYN, F is FIN, R is RST, P is PSH, and the dot is ACK.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet, Icmpv6Packet,
    IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, TcpOption, TcpPacket,
    TcpSeqNumber,
};
use vmring_core::offload::{Checksum, Gso, OffloadHeader};
use vmring_embedded::software;
use vmring_nat::{Counter, Link, NatConfig, SocketError};

use super::port::{GATEWAY_MAC, GUEST_MAC, Net, config, plain_link};

/// The byte at this place of the guest's stream.
pub(crate) fn from_guest(at: usize) -> u8 {
    (at * 7 + at / 251 + 3) as u8
}

/// The byte at this place of the peer's stream.
pub(crate) fn from_world(at: usize) -> u8 {
    (at * 5 + at / 241 + 1) as u8
}

pub(crate) fn stream(byte: impl Fn(usize) -> u8, from: usize, to: usize) -> Vec<u8> {
    (from..to).map(byte).collect()
}

/// A segment, with its absolute numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) flags: String,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) shift: Option<u8>,
    pub(crate) data: Vec<u8>,
}

impl Segment {
    /// The frame of a segment from `from` to `to`.
    pub(crate) fn frame(&self, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let options = [
            self.mss.map(TcpOption::MaxSegmentSize),
            self.shift.map(|_| TcpOption::NoOperation),
            self.shift.map(TcpOption::WindowScale),
        ];
        let options_len: usize = options.iter().flatten().map(|option| option.buffer_len()).sum();
        let header_len = 20 + options_len.next_multiple_of(4);
        let mut bytes = vec![0; header_len + self.data.len()];
        let mut tcp = TcpPacket::new_unchecked(&mut bytes);
        tcp.set_src_port(from.port());
        tcp.set_dst_port(to.port());
        tcp.set_seq_number(TcpSeqNumber(self.seq as i32));
        tcp.set_ack_number(TcpSeqNumber(self.ack as i32));
        tcp.set_header_len(header_len as u8);
        tcp.set_syn(self.flags.contains('S'));
        tcp.set_fin(self.flags.contains('F'));
        tcp.set_rst(self.flags.contains('R'));
        tcp.set_psh(self.flags.contains('P'));
        tcp.set_ack(self.flags.contains('.'));
        tcp.set_window_len(self.window);
        let mut rest = tcp.options_mut();
        for option in options.into_iter().flatten() {
            rest = option.emit(rest);
        }
        bytes[header_len..].copy_from_slice(&self.data);
        let (source, target) = (IpAddress::from(from.ip()), IpAddress::from(to.ip()));
        TcpPacket::new_unchecked(&mut bytes).fill_checksum(&source, &target);
        ip_frame(from.ip(), to.ip(), IpProtocol::Tcp, &bytes)
    }

    /// The segment in a frame for the guest, whose headers and checksums must be right.
    pub(crate) fn parse(
        frame: &[u8],
        header: &OffloadHeader,
        link: &Link,
    ) -> Option<(Self, IpAddr)> {
        let mut frame = frame.to_vec();
        let gso = header.gso;
        if gso == Gso::None {
            assert!(frame.len() <= link.mtu as usize + 14, "a frame longer than the MTU");
            software::complete_checksum(header, &mut frame)
                .expect("the header describes the frame");
        } else {
            assert!(matches!(header.checksum, Checksum::Partial { .. }));
            header.validate(frame.len()).expect("the header describes the frame");
            // As a reader does that cuts nothing.
            let whole = OffloadHeader { gso: Gso::None, ..*header };
            software::complete_checksum(&whole, &mut frame).expect("a checksum");
        }
        assert!(frame.len() >= 60, "a runt");
        let ethernet = EthernetFrame::new_checked(&frame[..]).unwrap();
        assert_eq!(ethernet.src_addr().0, GATEWAY_MAC);
        assert_eq!(ethernet.dst_addr().0, GUEST_MAC);
        let (source, target, protocol, payload): (IpAddr, IpAddr, _, _) = match ethernet.ethertype()
        {
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
                assert!(ip.verify_checksum());
                (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload())
            }
            EthernetProtocol::Ipv6 => {
                let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
                (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload())
            }
            other => panic!("a frame of type {other}"),
        };
        if protocol != IpProtocol::Tcp {
            match protocol {
                IpProtocol::Icmp => {
                    assert!(Icmpv4Packet::new_checked(payload).unwrap().verify_checksum())
                }
                IpProtocol::Icmpv6 => {
                    let (IpAddr::V6(source), IpAddr::V6(target)) = (source, target) else {
                        panic!()
                    };
                    let icmp = Icmpv6Packet::new_checked(payload).unwrap();
                    assert!(icmp.verify_checksum(&source, &target));
                }
                other => panic!("a packet of protocol {other}"),
            }
            return None;
        }
        let tcp = TcpPacket::new_checked(payload).unwrap();
        assert!(tcp.verify_checksum(&source.into(), &target.into()), "TCP's checksum");
        let mut flags = String::new();
        for (is, name) in [(tcp.syn(), 'S'), (tcp.fin(), 'F'), (tcp.rst(), 'R'), (tcp.psh(), 'P')] {
            flags.extend(is.then_some(name));
        }
        flags.extend(tcp.ack().then_some('.'));
        let (mut mss, mut shift, mut rest) = (None, None, tcp.options());
        while !rest.is_empty() {
            let (next, option) = TcpOption::parse(rest).unwrap();
            match option {
                TcpOption::MaxSegmentSize(value) => mss = Some(value),
                TcpOption::WindowScale(value) => shift = Some(value),
                _ => {}
            }
            rest = next;
        }
        let segment = Self {
            flags,
            seq: tcp.seq_number().0 as u32,
            ack: tcp.ack_number().0 as u32,
            window: tcp.window_len(),
            mss,
            shift,
            data: tcp.payload().to_vec(),
        };
        Some((segment, target))
    }
}

/// The frame of an IP packet from the guest.
pub(crate) fn ip_frame(from: IpAddr, to: IpAddr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let (payload_len, hop_limit) = (payload.len(), 64);
    let mut ip = match (from, to) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let mut ip = vec![0; 20 + payload_len];
            Ipv4Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit }
                .emit(&mut Ipv4Packet::new_unchecked(&mut ip), &ChecksumCapabilities::default());
            ip
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let mut ip = vec![0; 40 + payload_len];
            Ipv6Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit }
                .emit(&mut Ipv6Packet::new_unchecked(&mut ip));
            ip
        }
        _ => panic!("two families"),
    };
    let at = ip.len() - payload_len;
    ip[at..].copy_from_slice(payload);
    let ethertype = if from.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
    let mut frame = vec![0; 14 + ip.len()];
    EthernetRepr {
        src_addr: EthernetAddress(GUEST_MAC),
        dst_addr: EthernetAddress(GATEWAY_MAC),
        ethertype,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut frame));
    frame[14..].copy_from_slice(&ip);
    frame
}

/// A guest that follows a script.
pub(crate) struct Script {
    pub(crate) net: Net,
    pub(crate) guest: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// The guest's first sequence number.
    pub(crate) isn: u32,
    /// The translator's, as of the last SYN of it.
    pub(crate) iss: u32,
    /// The peer that commands are about: the last that was connected to.
    written: usize,
}

/// Runs a body with each place where bytes are retained, and each IP.
pub(crate) fn each_way(body: impl Fn(&mut Script)) {
    for rings_only in [false, true] {
        for v6 in [false, true] {
            eprintln!("rings_only: {rings_only}, v6: {v6}");
            body(&mut Script::new(config(rings_only), plain_link(), v6));
        }
    }
}

impl Script {
    pub(crate) fn new(config: NatConfig, link: Link, v6: bool) -> Self {
        let (guest, remote) = if v6 {
            ("[fd00::2]:40000", "[2001:db8::1]:80")
        } else {
            ("192.168.64.2:40000", "192.0.2.80:80")
        };
        let (guest, remote) = (guest.parse().unwrap(), remote.parse().unwrap());
        // So that the guest's numbers wrap soon.
        let isn = 0u32.wrapping_sub(150);
        Self { net: Net::new(config, link), guest, remote, isn, iss: 0, written: 0 }
    }

    fn peer(&self) -> usize {
        self.net.kernel.len().checked_sub(1).expect("a socket")
    }

    fn outgoing(&self, line: &str) -> Vec<u8> {
        let (mut words, flags) = split(line);
        let mut segment = Segment { flags, ..Segment::default() };
        let (from, to) = range(words.next().expect("a sequence number"));
        segment.seq = self.isn.wrapping_add(from as u32);
        segment.data = stream(from_guest, from.wrapping_sub(1), to.wrapping_sub(1));
        let words: Vec<_> = words.collect();
        for pair in words.chunks(2) {
            let value: u64 = pair[1].parse().expect(pair[1]);
            match pair[0] {
                "ack" => segment.ack = self.iss.wrapping_add(value as u32),
                "win" => segment.window = value as u16,
                "mss" => segment.mss = Some(value as u16),
                "ws" => segment.shift = Some(value as u8),
                other => panic!("what is {other}?"),
            }
        }
        segment.frame(self.guest, self.remote)
    }

    /// The next segment that the guest gets.
    pub(crate) fn next(&mut self) -> Option<Segment> {
        let (frame, header) = self.net.out.frames.pop_front()?;
        let (segment, to) = Segment::parse(&frame, &header, &self.net.out.link).expect("TCP");
        assert_eq!(to, self.guest.ip());
        Some(segment)
    }

    fn expect(&mut self, line: &str) {
        let (mut words, flags) = split(line);
        let (from, to) = range(words.next().expect("a sequence number"));
        let Some(segment) = self.next() else { panic!("nothing came instead of: {line}") };
        if flags.contains('S') {
            self.iss = segment.seq;
        }
        let seq = segment.seq.wrapping_sub(self.iss);
        let ack = segment.ack.wrapping_sub(self.isn);
        let said = format!(
            "{} {seq}:{} ack {ack} win {} mss {:?} ws {:?}",
            segment.flags,
            seq as usize + segment.data.len(),
            segment.window,
            segment.mss,
            segment.shift
        );
        // PSH is a hint. It has to be there where the line has it.
        assert!(
            segment.flags.contains('P') || !flags.contains('P'),
            "without PSH, for {line}: {said}"
        );
        let plain = |flags: &str| flags.replace('P', "");
        assert_eq!(plain(&segment.flags), plain(&flags), "for {line}: {said}");
        let is_bare = flags == "R";
        if !flags.contains('R') || is_bare {
            assert_eq!((seq as usize, segment.data.len()), (from, to - from), "for {line}: {said}");
        }
        let expected = stream(from_world, from.wrapping_sub(1), to.wrapping_sub(1));
        assert!(segment.data == expected, "wrong bytes for {line}");
        let words: Vec<_> = words.collect();
        for pair in words.chunks(2) {
            let value: u32 = pair[1].parse().expect(pair[1]);
            match pair[0] {
                "ack" => assert_eq!(ack, value, "for {line}: {said}"),
                "win" => assert_eq!(u32::from(segment.window), value, "for {line}: {said}"),
                "mss" => assert_eq!(segment.mss, Some(value as u16), "for {line}: {said}"),
                "ws" => assert_eq!(segment.shift, Some(value as u8), "for {line}: {said}"),
                other => panic!("what is {other}?"),
            }
        }
    }

    fn expect_icmp(&mut self, line: &str) {
        let words: Vec<u8> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let (frame, header) = self.net.out.frames.pop_front().expect(line);
        assert!(Segment::parse(&frame, &header, &self.net.out.link).is_none(), "for icmp {line}");
        let (at, quoted) = if self.guest.is_ipv4() { (34, 20) } else { (54, 40) };
        assert_eq!(frame[at..at + 2], words[..2], "type and code, for icmp {line}");
        // The guest finds its connection by the ports that are quoted.
        let ports = &frame[at + 8 + quoted..][..4];
        let (from, to) = (self.guest.port(), self.remote.port());
        assert_eq!(ports, [from.to_be_bytes(), to.to_be_bytes()].concat(), "the quoted ports");
    }

    /// The peer's stream up to here was written to the socket.
    fn peer_writes(&mut self, len: usize) {
        let bytes = stream(from_world, self.written, self.written + len);
        self.written += len;
        self.net.kernel.write(self.peer(), &bytes);
    }

    fn command(&mut self, line: &str) {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<usize>().expect(word);
        match words[..] {
            ["peer", "connects"] => {
                self.written = 0;
                self.net.kernel.connect(self.peer(), Ok(()));
            }
            ["peer", "refuses"] => self.fails(SocketError::Refused),
            ["peer", "fails", why] => self.fails(match why {
                "network" => SocketError::NetworkUnreachable,
                "host" => SocketError::HostUnreachable,
                "time" => SocketError::TimedOut,
                "denied" => SocketError::Denied,
                "port" => SocketError::NoPort,
                "memory" => SocketError::NoMemory,
                other => panic!("what is {other}?"),
            }),
            ["peer", "writes", len] => self.peer_writes(number(len)),
            ["peer", "writes", len, "and", "finishes"] => {
                let bytes = stream(from_world, self.written, self.written + number(len));
                self.written += number(len);
                self.net.kernel.write_and_finish(self.peer(), &bytes);
            }
            ["peer", "writes", len, "before", "a", "reset"] => {
                let bytes = stream(from_world, self.written, self.written + number(len));
                self.written += number(len);
                self.net.kernel.write_before_reset(self.peer(), &bytes);
            }
            ["peer", "finishes"] => self.net.kernel.finish(self.peer()),
            ["peer", "resets"] => self.net.kernel.reset(self.peer()),
            ["peer", "reads", len] => self.net.kernel.read(self.peer(), number(len)),
            ["peer", "got", "fin"] => {
                assert!(self.net.kernel.with(self.peer(), |peer| peer.got_fin()), "no FIN");
            }
            ["peer", "got", "no", "fin"] => {
                assert!(!self.net.kernel.with(self.peer(), |peer| peer.got_fin()), "FIN");
            }
            ["peer", "got", "reset"] => {
                let closed = self.net.kernel.with(self.peer(), |peer| peer.closed);
                assert_eq!(closed, Some(true), "no reset");
            }
            ["peer", "got", "close"] => {
                let closed = self.net.kernel.with(self.peer(), |peer| peer.closed);
                assert_eq!(closed, Some(false), "not closed cleanly");
            }
            ["peer", "is", "open"] => {
                assert_eq!(self.net.kernel.with(self.peer(), |peer| peer.closed), None);
            }
            ["peer", "got", len] => {
                let sent = self.net.kernel.with(self.peer(), |peer| peer.sent.clone());
                assert_eq!(sent.len(), number(len), "bytes at the peer");
                assert!(sent == stream(from_guest, 0, sent.len()), "wrong bytes at the peer");
            }
            ["port", "space", frames] => self.net.set_space(number(frames)),
            ["wait", ms] => self.net.wait(Duration::from_millis(number(ms) as u64)),
            ["nothing"] => {
                if let Some(segment) = self.next() {
                    let seq = segment.seq.wrapping_sub(self.iss);
                    panic!(
                        "something came: {} {seq} and {} bytes",
                        segment.flags,
                        segment.data.len()
                    );
                }
            }
            ["count", name, n] => {
                let counter = Counter::ALL.iter().find(|counter| format!("{counter:?}") == name);
                let counters = self.net.nat.counters();
                let value = counters[*counter.expect(name)];
                assert_eq!(value, number(n) as u64, "{name} in {counters:?}");
            }
            ["empty"] => self.net.assert_empty(),
            _ => panic!("what is: {line}?"),
        }
        self.net.settle();
    }

    fn fails(&mut self, error: SocketError) {
        self.net.kernel.connect(self.peer(), Err(error));
    }

    /// Follows a script.
    pub(crate) fn run(&mut self, script: &str) -> &mut Self {
        let mut lines = script
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default().trim())
            .filter(|line| !line.is_empty())
            .peekable();
        while let Some(line) = lines.next() {
            eprintln!("{line}");
            self.net.settle();
            if let Some(segment) = line.strip_prefix('<') {
                let mut frames = vec![self.outgoing(segment)];
                while let Some(more) = lines.next_if(|line| line.starts_with('&')) {
                    eprintln!("{more}");
                    frames.push(self.outgoing(&more[1..]));
                }
                self.net.send(&frames);
            } else if let Some(segment) = line.strip_prefix('>') {
                match segment.trim().strip_prefix("icmp") {
                    Some(icmp) => self.expect_icmp(icmp),
                    None => self.expect(segment),
                }
            } else {
                self.command(line);
            }
        }
        self
    }

    /// The handshake. The guest takes segments of 1,000 bytes and offers windows in units of 128.
    pub(crate) fn open(&mut self) -> &mut Self {
        self.run(
            "
            < S 0 win 65535 mss 1000 ws 7
            nothing
            peer connects
            > S. 0 ack 1 ws 8
            < . 1 ack 1 win 512
            nothing
            ",
        )
    }
}

fn split(line: &str) -> (std::str::SplitWhitespace<'_>, String) {
    let mut words = line.split_whitespace();
    let flags = words.next().expect("flags").to_owned();
    (words, flags)
}

/// `10:20`, or `10` for `10:10`.
fn range(word: &str) -> (usize, usize) {
    let (from, to) = word.split_once(':').unwrap_or((word, word));
    (from.parse().expect(word), to.parse().expect(word))
}
